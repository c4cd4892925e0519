"""The gumbel-mask pass learns masks and leaves weights alone; see tests/core/training/test_gumbel.py."""

from __future__ import annotations

import pytest
import torch
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError
from sparsec.passes.gumbel_mask import GumbelMask


def test_masks_are_learnt_and_kept_weights_are_those_that_were_given() -> None:
    program = wide({"*": "2:4"})
    done, report = run("gumbel-mask{epochs=4, lr=0.01, gate_lr=0.01, weight_decay=0.5}", program)
    size = PassManager.parse("mask | freeze").run(program)

    check(done, "2:4")
    for site in done.sites.sparse:
        found, given = site.read(done.module), site.read(program.module)
        assert torch.equal(given * (found != 0), found)
        assert not torch.equal(found, size.sites[site.name].read(size.module))
    assert 24 == len(report.data["curves"]["certainty"])


def test_frozen_epochs_train_what_is_left() -> None:
    program = wide({"*": "1:4"})
    done, _ = run("gumbel-mask{epochs=2, frozen_epochs=1, lr=0.01}", program)

    check(done, "1:4")
    for site in done.sites.sparse:
        found = site.read(done.module)
        assert not torch.equal(site.read(program.module) * (found != 0), found)


def test_the_memory_is_what_it_says_and_none_of_the_optimizer() -> None:
    made = loop(GumbelMask().method())
    made.run(2)
    site = made.engine.sites[0]

    assert 28 * site.parameter.numel() == sum(tensor.nbytes for tensor in site.tensors.values())
    assert site.parameter not in made.optimizer.state


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so gumbel-mask has no weights to choose"):
        run("gumbel-mask{epochs=1}", masked)


@pytest.mark.parametrize("options", ["gate_lr=0", "prior=-1", "keep_large=-1", "frozen_epochs=3"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"pass gumbel-mask: {options.partition('=')[0]} is"):
        PassManager.parse(f"gumbel-mask{{{options}}}")
    with pytest.raises(PatternError, match=r"up\.weight: gumbel-mask learns .* each group of 3:10 has 120"):
        run("gumbel-mask{pattern=3:10}")
    assert "lossy" == GumbelMask.equivalence
