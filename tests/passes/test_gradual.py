"""The gradual pass prunes more and more while training. What all training passes share is tested with admm."""

from __future__ import annotations

import pytest
from training_models import check, run, wide

from sparsec import PassManager
from sparsec.errors import RecipeError, UsageError
from sparsec.passes.gradual import Gradual


@pytest.mark.parametrize("pattern", ["1:4", "4:2:8", "4:2:6@strip", "unstructured:0.75"])
def test_density_falls_to_that_of_the_pattern_and_stays(pattern: str) -> None:
    done, report = run(f"gradual{{pattern={pattern}, epochs=4, every=1, lr=0.01, end=0.5}}")
    densities = [value for _, value in report.data["curves"]["density"]]

    check(done, pattern)
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 2
    assert pytest.approx(1 - report.data["zeros"]) == densities[-1]
    assert 12 == report.data["curves"]["density"][-1][0]  # from end=0.5 of 24 steps on masks are final


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so gradual has no weights to choose"):
        run("gradual{epochs=1}", masked)


@pytest.mark.parametrize("options", ["start=0.6", "end=0", "start=-1", "end=2", "every=0"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="pass gradual: "):
        PassManager.parse(f"gradual{{{options}}}")


def test_a_training_too_short_for_the_path_is_refused() -> None:
    with pytest.raises(UsageError, match="the pattern cannot be reached gradually: of 6 steps"):
        run("gradual{pattern=2:4, epochs=1}")
    assert "lossy" == Gradual.equivalence
