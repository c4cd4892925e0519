"""The movement pass keeps the weights that grow. Its scores are tested in tests/core/training."""

from __future__ import annotations

import pytest
import torch
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError
from sparsec.passes.movement import Movement
from sparsec.program import Program


def masks(program: Program) -> list[torch.Tensor]:
    return [site.read(program.module) != 0 for site in program.sites.sparse]


def test_masks_follow_the_movement_and_not_the_size() -> None:
    text = "{pattern=2:4, epochs=4, every=2, lr=0.01"
    done, report = run(f"movement{text}}}")
    other, _ = run(f"gradual{text}, start=0.1, end=0.8}}")

    check(done, "2:4")
    assert 0.5 == report.data["zeros"]
    assert not any(map(torch.equal, masks(done), masks(other)))


def test_what_is_masked_can_return_though_it_is_not_trained() -> None:
    made = loop(Movement(start=0.0, end=1.0, every=2).method(), "unstructured:0.75", lr=0.05)
    site, returned = made.engine.sites[0], 0
    made.run(2)
    for step in range(4, 12, 2):
        before = site.tensors["mask"]
        made.run(step)
        returned += int((site.tensors["mask"] & ~before).sum())

    assert 0 < returned
    assert 5 * site.parameter.numel() == sum(tensor.nbytes for tensor in site.tensors.values())


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so movement has no weights to choose"):
        run("movement{epochs=1}", masked)


@pytest.mark.parametrize("options", ["start=-1", "every=0", "normalise=max", "scope=global"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="movement"):
        PassManager.parse(f"movement{{{options}}}")
    with pytest.raises(PatternError, match="gradual pruning is defined for"):
        run("movement{pattern=4:2:5+2:4, every=1}")
    assert "lossy" == Movement.equivalence
