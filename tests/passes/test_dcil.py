"""The dcil pass trains kept and masked weights by a forward of each."""

from __future__ import annotations

import pytest
import torch
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import RecipeError, UsageError
from sparsec.passes.dcil import Dcil
from sparsec.training.dual import Dual, DualModel
from sparsec.training.losses import Distillation
from sparsec.training.model import LOSS
from sparsec.training.parts import Method
from sparsec.training.schedules import Repeated

SAME = 1e-5  # of sums of 16 float32 products in another order


def test_masks_move_and_end_in_the_pattern() -> None:
    done, report = run("dcil{pattern=16:2:8, epochs=3, every=2, frozen_epochs=1, lr=0.05}")

    check(done, "16:2:8")
    assert [2, 4, 6, 8, 10, 12] == [step for step, _ in report.data["curves"]["density"]]


@pytest.mark.parametrize("mutual", [0.0, 1.0])
def test_kept_weights_have_the_pruned_models_gradient_and_masked_ones_the_dense_ones(mutual: float) -> None:
    made = loop(Method(Repeated(2), Dual()))
    model = DualModel(made.model, made.engine, Distillation(mutual))
    batch = made.batches.epoch(0, 0)[0]
    assert model.objective is not None
    counts = model.objective.counts([batch])
    one = made.engine.sites[1]
    mask = one.tensors["mask"]
    model.training = True  # the graph itself stays as in eval mode: no dropout is drawn

    def gradient() -> torch.Tensor:
        assert one.parameter.grad is not None
        found, one.parameter.grad = one.parameter.grad, None
        return found

    model.with_loss(batch, counts)[LOSS].backward()
    both = gradient()
    masked, dense = model.outputs(batch), model._dense(batch)
    term = Distillation(mutual)

    def loss(outputs: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> torch.Tensor:
        fixed = {name: value.detach() for name, value in other.items()}
        own = torch.nn.functional.cross_entropy(outputs["logits"], batch["labels"])
        return own + mutual * term.sum(outputs, batch, fixed) / 16

    loss(masked, dense).backward(retain_graph=True)
    kept = gradient()
    loss(dense, masked).backward()
    left = gradient()

    assert not kept[~mask].any()
    assert not left[mask].any()
    assert bool(left[~mask].any())
    assert torch.allclose(kept + left, both, rtol=0, atol=SAME)


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so dcil has no weights to choose"):
        run("dcil{epochs=1}", masked)


@pytest.mark.parametrize("options", ["mutual=-1", "every=0", "frozen_epochs=3"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"pass dcil: {options.partition('=')[0]} is"):
        PassManager.parse(f"dcil{{{options}}}")
    with pytest.raises(UsageError, match="masks would never be chosen anew"):
        run("dcil{pattern=2:4, epochs=1}")
    assert "lossy" == Dcil.equivalence
