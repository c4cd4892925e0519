"""Every example runs as a user would run it, and stays under a page."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsec import PassManager
from sparsec.errors import RecipeError, VerificationError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_is_short(path: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert len(path.read_text().splitlines()) < 60


def test_the_examples_are_numbered_in_order() -> None:
    numbers = [path.stem.partition("_")[0] for path in EXAMPLES]

    assert [f"{i:02}" for i in range(1, len(numbers) + 1)] == numbers


def test_the_pass_of_the_example_does_what_it_says_and_is_held_to_its_word() -> None:
    """It fires, it leaves a site alone with the reason, a second run changes nothing, and it may not lie."""
    example: Any = runpy.run_path(str(EXAMPLES[1]))
    weak_rows, program = example["WeakRows"], example["program"]
    once, (report,) = PassManager((weak_rows(share=0.3),)).run_reported(program, check="outputs")
    weight, before = once.sites["0.weight"].read(once.module), program.sites["0.weight"].read(program.module)
    zero = (weight == 0).all(dim=2)[0]

    assert "weak-rows{share=0.3}" == report.text
    assert ({"zeroed": 12}, ["2.weight"]) == (report.data, [note.site for note in report.notes])
    assert 12 == int(zero.sum())
    assert bool((weight[:, ~zero] == before[:, ~zero]).all())
    assert before[0, zero].norm(dim=1).max() <= before[0, ~zero].norm(dim=1).min()
    twice = PassManager((weak_rows(share=0.3),)).run(once)
    assert once.dump(hashes=True) == twice.dump(hashes=True)
    nothing = PassManager((weak_rows(share=0.0),)).run(program)
    assert program.dump(hashes=True) == nothing.dump(hashes=True)
    liar = dataclasses.make_dataclass("Liar", [], bases=(weak_rows,), frozen=True, namespace={"equivalence": "exact"})
    with pytest.raises(VerificationError, match=r"pass weak-rows: it changed output output by .*; it declares exact"):
        PassManager((liar(),)).run(program, check="outputs")
    masked = "mask{pattern=2:4} | freeze | lower"
    with pytest.raises(RecipeError, match="it is no longer traced after lower: put weak-rows before it"):
        PassManager((*PassManager.parse(masked).passes, weak_rows())).run(program)
