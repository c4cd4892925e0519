"""The s-ste pass trains weights through a soft threshold, which is tested in tests/core/training."""

from __future__ import annotations

import pytest
import torch
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError
from sparsec.passes.s_ste import SSte


def test_masks_move_while_training_and_end_in_the_pattern() -> None:
    done, report = run("s-ste{pattern=16:2:8, epochs=4, lr=0.05}")

    check(done, "16:2:8")
    assert 24 == len(report.data["curves"]["changed"])
    assert any(share > 0 for _, share in report.data["curves"]["changed"])


def test_frozen_epochs_train_the_shrunk_weights() -> None:
    done, report = run("s-ste{pattern=2:4, epochs=3, frozen_epochs=2, lr=0.05}")

    check(done, "2:4")
    assert [1, 2, 3, 4, 5, 6] == [step for step, _ in report.data["curves"]["changed"]]


def test_what_is_kept_is_what_the_model_computed_with() -> None:
    made = loop(SSte().method(), "2:4")
    made.run(5)
    site = made.engine.sites[0]
    before = site.parameter.detach().clone()
    with made.engine.pruned():
        assert torch.equal(before, site.parameter.detach())

    assert 5 * site.parameter.numel() + 4 == sum(tensor.nbytes for tensor in site.tensors.values())


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so s-ste has no weights to choose"):
        run("s-ste{epochs=1}", masked)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RecipeError, match="pass s-ste: frozen_epochs is 3 of 3 epochs"):
        PassManager.parse("s-ste{frozen_epochs=3}")
    with pytest.raises(PatternError, match=r"up\.weight: a soft threshold is defined for .* found 4:2:5@strip"):
        run("s-ste{pattern=4:2:5@strip}")
    assert "lossy" == SSte.equivalence
