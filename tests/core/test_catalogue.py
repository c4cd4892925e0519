"""Every pass and backend is listed, documented and tested."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

from sparsec import catalogue, registry
from sparsec.errors import UsageError
from sparsec.pattern import Pattern
from sparsec.pipeline import Pass
from sparsec.program import FACTS
from sparsec.recipe import make_pass

ROOT = Path(__file__).resolve().parents[2]
PASSES = sorted(name for name, entry in registry.passes().items() if entry.distribution == registry.OURS)
BACKENDS = sorted(name for name, entry in registry.backends().items() if entry.distribution == registry.OURS)


def test_every_file_of_a_pass_is_in_the_table() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("*.py")} - {"--init--"}

    assert files == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_has_its_file_its_test_and_its_words(name: str) -> None:
    module = name.replace("-", "_")
    cls = registry.pass_class(name)

    assert f"sparsec.passes.{module}:{cls.__name__}" == registry.passes()[name].target
    assert (ROOT / "tests" / "passes" / f"test_{module}.py").is_file()
    assert name == cls.name
    assert cls.__name__.lower() == name.replace("-", "")
    documented = inspect.cleandoc(cls.__doc__ or "")
    assert documented.partition("\n\n")[0].endswith(".") or ";" in documented
    assert "\n1. " in documented, "its rules are numbered"


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_is_a_value_with_known_facts(name: str) -> None:
    cls = registry.pass_class(name)

    assert issubclass(cls, Pass)
    assert cls.requires | cls.establishes | cls.drops <= FACTS
    assert cls.equivalence in ("exact", "close", "lossy")
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(cls))
    assert make_pass(name, {}) == cls()


def test_the_catalogue_has_every_pass_with_its_options() -> None:
    found = {entry["name"]: entry for entry in catalogue.passes()}

    assert set(PASSES) <= found.keys()
    assert 'pattern="", score=magnitude, columns=greedy, normalise=none' == found["mask"]["options"]
    assert all(found[name]["summary"] and "\n" not in found[name]["summary"] for name in PASSES)


def test_the_catalogue_has_every_backend_with_its_state() -> None:
    found = {entry["name"]: entry for entry in catalogue.backends()}

    assert set(BACKENDS) <= found.keys()
    assert all(
        found[name]["describes"] and found[name]["status"] and "sparsec" == found[name]["from"] for name in BACKENDS
    )


def test_the_patterns_of_the_catalogue_are_in_their_words() -> None:
    found = {entry["text"]: entry for entry in catalogue.patterns()}

    assert ("0.429x", "0.531x", "1.000x") == tuple(found[text]["bytes"] for text in ("64:2:5", "2:4", "dense"))
    assert all(Pattern.parse(text).words == entry["words"] for text, entry in found.items())


def test_an_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="unknown backend 'onx'; did you mean onnx"):
        registry.backend("onx")
    with pytest.raises(UsageError, match=f"there are {', '.join(registry.backend_table())}"):
        registry.backend("tpu")
