"""The seven-pre pass prunes by the gradients of a few batches. Its scores are tested in tests/core/training."""

from __future__ import annotations

import pytest
import torch
from training_models import check, run, wide

from sparsec import PassManager
from sparsec.errors import RecipeError
from sparsec.passes.seven_pre import SevenPre
from sparsec.program import Program

OPTIONS = "scope=local, epochs=1, lr=0.01"


def masks(program: Program) -> list[torch.Tensor]:
    return [site.read(program.module) != 0 for site in program.sites.sparse]


def test_masks_are_those_of_the_model_that_was_given_whatever_is_trained() -> None:
    program = wide({"*": "16:2:8"})
    done, _ = run(f"seven-pre{{{OPTIONS}, weight_decay=0.5}}", program)
    other, _ = run("seven-pre{scope=local, epochs=3, lr=0.05}", program)
    fewer, _ = run(f"seven-pre{{{OPTIONS}, score_batches=1}}", program)
    size = PassManager.parse("mask{columns=l2} | freeze").run(program)

    check(done, "16:2:8")
    assert all(map(torch.equal, masks(done), masks(other)))
    assert not all(map(torch.equal, masks(done), masks(fewer)))
    assert not any(map(torch.equal, masks(done), masks(size)))


def test_more_batches_than_there_are_go_through_the_data_again() -> None:
    done, _ = run(f"seven-pre{{pattern=2:4, {OPTIONS}, score_batches=15}}")

    check(done, "2:4")


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so seven-pre has no weights to choose"):
        run("seven-pre{epochs=1}", masked)


@pytest.mark.parametrize("options", ["score_batches=0", "beta1=1", "beta2=-0.1", "normalise=max", "scope=all"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="seven-pre"):
        PassManager.parse(f"seven-pre{{{options}}}")
    assert "lossy" == SevenPre.equivalence
