"""The fixed-mask pass trains what a mask keeps. What all training passes share is tested with admm."""

from __future__ import annotations

import pytest
import torch
from training_models import check, run, wide

from sparsec import PassManager
from sparsec.errors import RecipeError
from sparsec.passes.fixed_mask import FixedMask

OPTIONS = "epochs=2, lr=0.01, weight_decay=0.5"


@pytest.mark.parametrize("before", ["mask", "mask | freeze"])
def test_the_mask_of_an_earlier_pass_is_kept(before: str) -> None:
    pruned = PassManager.parse(before).run(wide({"*": "2:4"}))
    done, _ = run(f"fixed-mask{{{OPTIONS}}}", pruned)

    check(done, "2:4")
    for site in pruned.sites.sparse:
        kept = done.sites[site.name].selection
        assert site.selection is not None and kept is not None
        assert torch.equal(site.selection.positions, kept.positions)


def test_without_one_it_is_that_of_magnitude() -> None:
    done, _ = run(f"fixed-mask{{pattern=4:2:5, {OPTIONS}}}")
    same, _ = run(f"fixed-mask{{{OPTIONS}}}", PassManager.parse("mask{columns=l2}").run(wide({"*": "4:2:5"})))

    check(done, "4:2:5")
    assert done.dump(hashes=True).splitlines()[1:] == same.dump(hashes=True).splitlines()[1:]


def test_a_second_run_trains_on_under_the_same_masks() -> None:
    once, _ = run(f"fixed-mask{{pattern=1:4, {OPTIONS}}}")
    twice, _ = run(f"fixed-mask{{{OPTIONS}}}", once)

    check(twice, "1:4")
    for site in once.sites.sparse:
        zeros = site.read(once.module) == 0
        assert torch.equal(zeros, twice.sites[site.name].read(twice.module) == 0)
        assert not torch.equal(site.read(once.module), twice.sites[site.name].read(twice.module))


def test_a_trained_program_can_be_masked_and_frozen_as_any_other() -> None:
    done, _ = run(f"fixed-mask{{pattern=2:4, {OPTIONS}}}")
    again = PassManager.parse("mask | freeze").run(done)

    assert torch.equal(done.sites["up.weight"].read(done.module), again.sites["up.weight"].read(again.module))


def test_a_site_without_pattern_is_trained_dense_and_reported() -> None:
    done, report = run(f"fixed-mask{{{OPTIONS}}}", wide({"up.weight": "2:4"}))

    notes = {note.site: note.text for note in report.notes}
    assert "no pattern; trained dense" == notes["down.weight"]
    assert "head" in notes["head.weight"]
    assert not torch.equal(wide().module.get_parameter("down.weight"), done.module.get_parameter("down.weight"))


def test_an_unknown_pattern_option_is_refused() -> None:
    with pytest.raises(RecipeError, match="pass fixed-mask: no site has a pattern"):
        run("fixed-mask")
    assert "lossy" == FixedMask.equivalence
