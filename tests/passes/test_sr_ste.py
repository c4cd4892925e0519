"""The sr-ste pass trains dense weights through their masks. What all training passes share is tested with admm."""

from __future__ import annotations

import pytest
import torch
from training_models import check, run, wide

from sparsec import PassManager
from sparsec.errors import RecipeError, UsageError
from sparsec.passes.sr_ste import SrSte


def test_masks_move_while_training_and_end_in_the_pattern() -> None:
    done, report = run("sr-ste{pattern=1:4, epochs=4, every=1, lr=0.05}")

    check(done, "1:4")
    assert 24 == len(report.data["curves"]["changed"])
    assert any(share > 0 for _, share in report.data["curves"]["changed"])


def test_a_mask_can_take_weights_that_it_left_out_at_first() -> None:
    done, _ = run("sr-ste{pattern=1:4, epochs=8, every=1, lr=0.05, decay=0}")
    first = PassManager.parse("mask").run(wide({"*": "1:4"})).sites["up.weight"].selection
    last = done.sites["up.weight"].selection

    assert first is not None and last is not None
    assert not torch.equal(first.positions, last.positions)


def test_frozen_epochs_keep_the_masks() -> None:
    done, report = run("sr-ste{pattern=2:4, epochs=3, every=2, frozen_epochs=2, lr=0.05}")

    check(done, "2:4")
    assert [2, 4, 6] == [step for step, _ in report.data["curves"]["changed"]]


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so sr-ste has no weights to choose"):
        run("sr-ste{epochs=1}", masked)


@pytest.mark.parametrize("options", ["decay=-1", "every=0", "frozen_epochs=3"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"pass sr-ste: {options.partition('=')[0]} is"):
        PassManager.parse(f"sr-ste{{{options}}}")
    with pytest.raises(UsageError, match="masks would never be chosen anew"):
        run("sr-ste{pattern=2:4, epochs=1, every=7}")
    assert "lossy" == SrSte.equivalence
