"""Passes and backends of other distributions: found by their entry points, loaded late, and never trusted blindly.

The distributions are real ones: a module and a dist-info folder on sys.path, as an installer leaves them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from models import Residual, made, random

from sparsec import PassManager, catalogue, registry, trace
from sparsec.errors import RecipeError, UsageError

PASS = '''
from dataclasses import dataclass
from typing import ClassVar
from sparsec.pipeline import Context, Equivalence, Pass, PassResult

@dataclass(frozen=True)
class Halve(Pass):
    """Halve every weight."""

    name: ClassVar[str] = "{name}"
    equivalence: ClassVar[Equivalence] = "lossy"
    by: float = 2.0

    def run(self, program, ctx):
        for site in program.sites:
            site.write(program.module, site.read(program.module) / self.by)
        return PassResult(program)
'''
BACKEND = """
from sparsec.backend import Backend, Emitted

class Text(Backend):
    name = "text"
    describes = "the sites as text"

    def unavailable(self):
        {unavailable}

    def plan(self, program, values, tokens):
        return ()

    def emit(self, program, folder, values):
        return Emitted(0, 0, {{}})

    def verify(self, folder, manifest, check):
        return []

    def load(self, folder, manifest):
        return None
"""


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    before = set(sys.modules)
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith("third_"):
            del sys.modules[name]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path, to install into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def install(site: Path, distribution: str, code: str, entry_points: str) -> None:
    """What `pip install distribution` would leave; its module is the distribution's name with underscores."""
    (site / f"{distribution.replace('-', '_')}.py").write_text(code)
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    registry._entries.cache_clear()


def install_pass(site: Path, distribution: str, name: str, code: str = PASS) -> None:
    module = distribution.replace("-", "_")
    install(site, distribution, code.format(name=name), f"[sparsec.passes]\n{name} = {module}:Halve\n")


def listed(kind: str = "passes") -> dict[str, dict[str, str]]:
    return {entry["name"]: entry for entry in getattr(catalogue, kind)()}


# Passes ---------------------------------------------------------------------------------------------------------------


def test_a_pass_of_another_distribution_runs_and_is_listed(site: Path) -> None:
    install_pass(site, "third-one", "halve")
    program = trace(made(Residual), (random(2, 5),))
    manager = PassManager.parse("halve{by=4} | mask{pattern=2:4}")
    result = manager.run(program, check="outputs")

    assert "halve{by=4.0} | mask{pattern=2:4}" == str(manager)
    weight = program.sites["up.weight"].read(program.module)
    assert bool((result.sites["up.weight"].read(result.module) == weight / 4).all())
    expected = {"summary": "Halve every weight.", "options": "by=2.0", "from": "third-one", "status": "available"}
    assert {"name": "halve", **expected} == listed()["halve"]
    assert "sparsec" == listed()["mask"]["from"]


def test_it_is_imported_only_when_it_is_asked_for(site: Path) -> None:
    install_pass(site, "third-one", "halve")
    PassManager.parse("mask | freeze")

    assert "halve" in registry.passes()
    assert "third_one" not in sys.modules
    registry.pass_class("halve")
    assert "third_one" in sys.modules


def test_a_typo_gets_the_name_of_another_distributions_pass(site: Path) -> None:
    install_pass(site, "third-one", "halve")

    with pytest.raises(RecipeError, match="unknown pass 'halv'; did you mean halve"):
        PassManager.parse("halv")


def test_a_missing_fact_is_found_in_other_distributions_too(site: Path) -> None:
    code = PASS.replace("by: float", 'establishes: ClassVar[frozenset] = frozenset({{"permuted"}})\n    by: float')
    install_pass(site, "third-one", "halve", code)
    install_pass(site, "third-two", "broken", "raise ImportError('no')")
    needs = PASS.replace("by: float", 'requires: ClassVar[frozenset] = frozenset({{"permuted"}})\n    by: float')
    install_pass(site, "third-three", "needy", needs)

    with pytest.raises(RecipeError, match="permuted is established by permute or halve: add it before needy"):
        PassManager.parse("needy").run(trace(made(Residual), (random(2, 5),)))


def test_a_name_of_ours_is_an_error_that_names_both(site: Path) -> None:
    install_pass(site, "third-one", "mask")

    with pytest.raises(RecipeError) as caught:
        PassManager.parse("mask | freeze")
    assert "pass mask: the name is given by sparsec (sparsec.passes.mask:Mask) and third-one (third_one:Halve)" in str(
        caught.value
    )
    assert "uninstall all but one of them" in listed()["mask"]["status"]
    assert "sparsec, third-one" == listed()["mask"]["from"]
    PassManager.parse("freeze")


def test_a_name_of_two_distributions_is_an_error_that_names_both(site: Path) -> None:
    for distribution in ("third-one", "third-two", "third-three"):
        install_pass(site, distribution, "halve")

    with pytest.raises(RecipeError) as caught:
        PassManager.parse("halve")
    for distribution in ("third-one (third_one:Halve)", "third-two (third_two:Halve)", "third-three (third_three:"):
        assert distribution in str(caught.value)
    PassManager.parse("mask | freeze")


BROKEN = {
    "import": ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
    "raise": ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    "exit": ("raise SystemExit(3)", "SystemExit: 3"),
    "syntax": ("def (", "SyntaxError"),
    "no class": ("x = 1", "AttributeError: module 'third_one' has no attribute 'Halve'"),
    "no pass": ("class Halve: pass", "a Halve is no pass"),
    "function": ("def Halve(): pass", "it is not a class"),
    "not decorated": (PASS.replace("@dataclass(frozen=True)", ""), "decorate the class"),
    "other name": (PASS.replace("{name}", "double"), "its class calls itself 'double'; the two names must agree"),
    "equivalence": (PASS.replace('"lossy"', '"maybe"'), "expected an equivalence of exact or close or lossy"),
}


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_pass_is_listed_with_its_reason_and_breaks_no_other(code: str, reason: str, site: Path) -> None:
    install_pass(site, "third-one", "halve", code.replace("{name}", "halve"))
    install_pass(site, "third-two", "third")

    with pytest.raises(RecipeError) as caught:
        PassManager.parse("halve")
    assert reason in str(caught.value)
    assert "pass halve of distribution third-one (third_one:Halve) cannot be used" in str(caught.value)
    assert "repair or uninstall third-one" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert reason in listed()["halve"]["status"]
    assert ["available"] * 3 == [listed()[name]["status"] for name in ("mask", "freeze", "third")]


@pytest.mark.parametrize(
    "text", ["[sparsec.passes]\nhalve\n", "[sparsec.passes]\nhalve = \n", "[sparsec.passes]\n = x\n"]
)
def test_entry_points_that_cannot_be_read_break_no_other(text: str, site: Path) -> None:
    install_pass(site, "third-two", "third")
    install(site, "third-one", "", text)

    assert "available" == listed()["third"]["status"]
    assert "available" == listed()["mask"]["status"]
    assert any("third-one" in entry["status"] for entry in listed().values())


@pytest.mark.parametrize("name", ["Halve", "ha lve", "halve{}", "ha_lve"])
def test_a_name_that_pass_text_cannot_hold_is_unavailable(name: str, site: Path) -> None:
    install(site, "third-one", PASS, f"[sparsec.passes]\n{name} = third_one:Halve\n")

    assert "gives a name that is not of lower-case letters, digits and dashes" in listed()[name]["status"]


def test_a_distribution_that_stands_twice_on_the_path_is_one(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_pass(site, "third-one", "halve")
    (tmp_path / "shadowed").mkdir()
    install_pass(tmp_path / "shadowed", "third-one", "halve")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "shadowed")])
    registry._entries.cache_clear()

    assert "available" == listed()["halve"]["status"]


def test_an_option_without_default_is_listed_by_its_name(site: Path) -> None:
    code = PASS.replace("by: float = 2.0", "by: float\n    rest: tuple[str, ...] = ()")
    install_pass(site, "third-one", "halve", code)

    assert listed()["halve"]["options"].startswith("by, rest=")
    with pytest.raises(RecipeError, match="pass halve: by is missing"):
        PassManager.parse("halve")


# Backends -------------------------------------------------------------------------------------------------------------


def install_backend(site: Path, code: str, name: str = "text") -> None:
    install(site, "third-one", code, f"[sparsec.backends]\n{name} = third_one:Text\n")


def test_a_backend_of_another_distribution_is_found_and_listed(site: Path) -> None:
    install_backend(site, BACKEND.format(unavailable="return 'buy a pen'"))

    assert "text" == registry.backend("text").name
    assert "text" in registry.backend_table()
    expected = {"describes": "the sites as text", "from": "third-one", "status": "buy a pen"}
    assert {"name": "text", **expected} == listed("backends")["text"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise OSError('no driver')", "OSError: no driver"),
        ("class Text: name = 'text'", "it is not a complete subclass"),
        (BACKEND.format(unavailable="return None").replace("def plan", "def plans"), "it is not a complete subclass"),
        (BACKEND.format(unavailable="return None") + "\n    def __init__(self): 1 / 0", "ZeroDivisionError"),
        (BACKEND.format(unavailable="1 / 0"), "ZeroDivisionError of distribution third-one: division by zero"),
    ],
)
def test_a_broken_backend_is_listed_with_its_reason_and_breaks_no_other(code: str, reason: str, site: Path) -> None:
    install_backend(site, code)

    assert reason in listed("backends")["text"]["status"]
    assert "kernel" == registry.backend("kernel").name


def test_a_backend_named_like_ours_is_an_error_that_names_both(site: Path) -> None:
    install_backend(site, BACKEND.format(unavailable="return None"), "kernel")

    with pytest.raises(UsageError, match=r"given by sparsec \(.*KernelBackend\) and third-one \(third_one:Text\)"):
        registry.backend("kernel")
    assert "onnx" == registry.backend("onnx").name


# The command ----------------------------------------------------------------------------------------------------------


def command(site: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(site)}
    code = [sys.executable, "-m", "sparsec.cli", *args]
    return subprocess.run(code, env=env, capture_output=True, text=True, timeout=120, cwd=site)


def test_the_command_lists_what_is_installed_and_help_loads_none_of_it(site: Path) -> None:
    install_pass(site, "third-one", "halve")
    install_pass(site, "third-two", "broken", "raise ImportError('no luck')")
    install_pass(site, "third-three", "loud", "raise SystemExit('a plug-in was imported')")
    listing = command(site, "passes", "--json")

    assert 0 == listing.returncode, listing.stderr
    found = {entry["name"]: entry for entry in json.loads(listing.stdout)["passes"]}
    assert ("third-one", "available") == (found["halve"]["from"], found["halve"]["status"])
    assert "no luck" in found["broken"]["status"]
    table = command(site, "passes").stdout
    assert "third-one" in table and "no luck" in " ".join(table.split())
    assert 0 == command(site, "--help").returncode
    assert 0 == command(site, "opt", "--help").returncode
