"""The seven-dyn pass prunes more and more by scores that add up. They are tested in tests/core/training."""

from __future__ import annotations

import pytest
from training_models import check, loop, run, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError, UsageError
from sparsec.passes.seven_dyn import SevenDyn


@pytest.mark.parametrize("pattern", ["1:4", "unstructured:0.75"])
def test_density_falls_and_what_is_pruned_does_not_return(pattern: str) -> None:
    made = loop(SevenDyn(start=0.0, end=1.0, every=2, scope="local").method(), pattern)
    site, before = made.engine.sites[0], None
    for step in range(2, 12, 2):
        made.run(step)
        mask = site.tensors.get("mask")
        if mask is not None and before is not None:
            assert not bool((mask & ~before).any())
        before = mask

    assert before is not None
    assert 0 < int((~before).sum())
    assert 13 * site.parameter.numel() + 8 == sum(tensor.nbytes for tensor in site.tensors.values())


def test_blocks_of_the_pattern_grow_on_the_path() -> None:
    done, report = run("seven-dyn{pattern=4:2:8, epochs=4, every=1, lr=0.01, end=0.5}")
    densities = [value for _, value in report.data["curves"]["density"]]

    check(done, "4:2:8")
    assert densities == sorted(densities, reverse=True)
    assert len(set(densities)) > 2


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so seven-dyn has no weights to choose"):
        run("seven-dyn{epochs=1}", masked)


@pytest.mark.parametrize("options", ["start=0.6, end=0.5", "every=0", "beta1=1", "normalise=max", "scope=all"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="seven-dyn"):
        PassManager.parse(f"seven-dyn{{{options}}}")


def test_what_has_no_path_is_refused() -> None:
    with pytest.raises(UsageError, match="the pattern cannot be reached gradually"):
        run("seven-dyn{pattern=2:4, epochs=1}")
    with pytest.raises(PatternError, match="gradual pruning is defined for"):
        run("seven-dyn{pattern=4:2:5+2:4, every=1}")
    assert "lossy" == SevenDyn.equivalence
