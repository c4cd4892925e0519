"""The training method that CONTRIBUTING.md shows works as it stands there: its file, its line, its test."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsec import passes, registry

PAGE = Path(__file__).parents[3] / "CONTRIBUTING.md"
MODULE = "sparsec.passes.random_mask"


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()


def test_the_method_shown_is_complete_and_passes_the_test_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    section = PAGE.read_text().partition("## Adding a training method")[2].partition("\n## ")[0]
    source, line, test = re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    module = types.ModuleType(MODULE)
    monkeypatch.setitem(sys.modules, MODULE, module)
    exec(compile(source, "passes/random_mask.py", "exec"), module.__dict__)
    entries = ast.literal_eval(f"{{{line}}}")
    for name, target in entries.items():
        monkeypatch.setitem(passes.TABLE, name, target)
    names: dict[str, object] = {}
    exec(compile(test, "tests/passes/test_random_mask.py", "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_") and callable(value)]

    assert {"random-mask": f"{MODULE}:RandomMask"} == entries
    assert 1 == len(tests)
    tests[0]()
