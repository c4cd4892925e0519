"""The platon pass prunes by an upper confidence bound. Its scores are tested in tests/core/training."""

from __future__ import annotations

import pytest
import torch
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError
from sparsec.passes.platon import Platon


def test_density_falls_and_the_pattern_holds() -> None:
    done, report = run("platon{pattern=16:2:8, epochs=4, every=1, lr=0.01}")
    densities = [value for _, value in report.data["curves"]["density"]]

    check(done, "16:2:8")
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 2


def test_what_is_zeroed_is_trained_on_and_can_return() -> None:
    made = loop(Platon(start=0.0, end=1.0, every=2, beta1=0.5, beta2=0.5).method(), "unstructured:0.75", lr=0.3)
    site, dropped = made.engine.sites[0], torch.zeros(20, 12, dtype=torch.bool)
    returned = 0
    for step in range(2, 12, 2):
        made.run(step)
        zeros = site.parameter.detach() == 0
        returned += int((dropped & ~zeros).sum())
        dropped |= zeros
        made.run(step + 1)
        assert not bool((site.parameter[zeros] == 0).all())

    assert 0 < returned
    assert 12 * site.parameter.numel() + 8 == sum(tensor.nbytes for tensor in site.tensors.values())


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so platon has no weights to choose"):
        run("platon{epochs=1}", masked)


@pytest.mark.parametrize("options", ["end=1.5", "every=0", "beta1=1", "normalise=max", "scope=all"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="platon"):
        PassManager.parse(f"platon{{{options}}}")
    with pytest.raises(PatternError, match="gradual pruning is defined for"):
        run("platon{pattern=4:2:5+2:4, every=1}")
    assert "lossy" == Platon.equivalence
