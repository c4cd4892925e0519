"""The mask-training pass trains masks and leaves weights alone; see tests/core/training/test_score_masks.py."""

from __future__ import annotations

import copy

import pytest
import torch
from training_models import check, context, loop, run, task, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError
from sparsec.passes.mask_training import MaskTraining
from sparsec.program import Program


def kept(program: Program, given: Program) -> list[bool]:
    """Whether each site's weights that are left are those of `given`."""
    pairs = [(site.read(program.module), given.sites[site.name].read(given.module)) for site in program.sites.sparse]
    return [torch.equal(before * (found != 0), found) for found, before in pairs]


@pytest.mark.parametrize(
    ("pattern", "options"),
    [("2:4", "init=hard"), ("16:2:8", "start_density=0.4"), ("unstructured:0.9", ""), ("1:4", "every=5")],
)
def test_masks_are_trained_and_kept_weights_are_those_that_were_given(pattern: str, options: str) -> None:
    program = wide({"*": pattern})
    text = "mask-training{epochs=4, score_lr=0.02, weight_decay=0.5" + (f", {options}" if options else "")
    done, report = run(f"{text}}}", program)
    size = PassManager.parse("mask | freeze").run(program)

    check(done, pattern)
    assert all(kept(done, program))
    assert not any(kept(done, size))
    densities = [value for _, value in report.data["curves"]["density"]]
    assert densities == sorted(densities, reverse=True)
    assert (densities[0] > densities[-1]) == (pattern != "2:4")


def test_the_rest_is_frozen_or_trained_and_free_again_afterwards() -> None:
    def others(program: Program) -> dict[str, torch.nn.Parameter]:
        names = {site.name for site in program.sites if site.pattern}
        return {name: one for name, one in program.module.named_parameters() if name not in names}

    given = others(wide({"*": "2:4"}))
    for rest in ("frozen", "trained"):
        done, _ = run(f"mask-training{{epochs=1, lr=0.01, rest={rest}}}", wide({"*": "2:4"}))
        found = others(done)
        assert found and found.keys() == given.keys()
        assert {rest == "frozen"} == {torch.equal(given[name], one) for name, one in found.items()}
        assert all(one.requires_grad for _, one in done.module.named_parameters())


def test_a_late_start_trains_the_dense_model_before() -> None:
    given = wide({"*": "2:4"})
    done, report = run("mask-training{epochs=2, lr=0.01, start_step=6}", given)

    check(done, "2:4")
    assert not any(kept(done, given))
    assert list(range(6, 13)) == [step for step, _ in report.data["curves"]["density"]]


def test_trained_masks_are_better_than_those_of_magnitude_that_they_begin_with() -> None:
    """A dense model is trained for half of the time; where scores begin it is judged under magnitude's masks."""
    text = "mask-training{epochs=12, lr=0.03, score_lr=0.01, start_step=36}"
    _, report = run(text, wide({"*": "2:4"}), context(eval=task()))
    judged = report.data["evaluation"]

    assert 36 == judged[5]["step"]
    assert judged[-1]["loss"] < 0.8 * judged[5]["loss"]


def test_fixed_mask_behind_it_trains_what_is_left() -> None:
    given = wide({"*": "2:4"})
    first, _ = run("mask-training{epochs=1, score_lr=0.02}", given)
    done, _ = run("mask-training{epochs=1, score_lr=0.02} | fixed-mask{epochs=1, lr=0.01}", given)

    check(done, "2:4")
    for site in done.sites.sparse:
        assert torch.equal(site.read(done.module) != 0, first.sites[site.name].read(first.module) != 0)
        assert not torch.equal(site.read(done.module), first.sites[site.name].read(first.module))


@pytest.mark.parametrize("at", [2, 7])
def test_a_training_that_goes_on_from_its_state_ends_with_the_same_bits(at: int) -> None:
    method = MaskTraining(score_lr=0.02, start_step=4, end=0.9).method()
    whole, begun, resumed = (loop(method, "unstructured:0.8") for _ in range(3))
    whole.run()
    begun.run(at)
    resumed.load_state(*copy.deepcopy(begun.state_dict()))
    resumed.run()

    assert whole.losses == resumed.losses
    assert whole.engine.curves == resumed.engine.curves
    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_the_memory_is_what_it_says_and_none_of_the_optimizer() -> None:
    made = loop(MaskTraining().method())
    made.run(2)
    site = made.engine.sites[0]

    assert 13 * site.parameter.numel() == sum(tensor.nbytes for tensor in site.tensors.values())
    assert site.parameter not in made.optimizer.state


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so mask-training has no weights to choose"):
        run("mask-training{epochs=1}", masked)


@pytest.mark.parametrize(
    "options", ["score_lr=0", "init=medium", "start_density=1", "end=0", "every=0", "start_step=-1", "rest=none"]
)
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"mask-training.*{options.partition('=')[0]}"):
        PassManager.parse(f"mask-training{{{options}}}")


def test_a_pattern_without_scores_of_its_own_is_refused() -> None:
    with pytest.raises(PatternError, match=r"mask-training is defined for N:M, V:N:M and unstructured patterns"):
        run("mask-training{pattern=4:2:5+2:4}")
    assert "lossy" == MaskTraining.equivalence


def test_masks_that_were_trained_in_one_model_are_trained_alone_in_another() -> None:
    """The recipe of docs/training.md: selections go from one program to the other, whose own weights they keep."""
    pretrained = wide()
    masked, _ = run("mask-training{epochs=2, lr=0.02, score_lr=0.02, start_step=6, pattern=2:4}", pretrained)
    start = pretrained.replace(sites=masked.sites, facts=pretrained.facts | {"selected"})
    done, _ = run("fixed-mask{epochs=1, lr=1e-9}", start)

    check(done, "2:4")
    for site in done.sites.sparse:
        kept = masked.sites[site.name].read(masked.module) != 0
        given = pretrained.sites[site.name].read(pretrained.module)
        assert torch.allclose(torch.where(kept, given, 0.0), site.read(done.module), atol=1e-6)
