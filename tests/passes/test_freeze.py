"""The freeze pass folds masks into weights and changes no output."""

from __future__ import annotations

import pytest
import torch
from models import Classifier, Residual, Tied, made, random
from torch import nn

from sparsec import PassManager, Program, _fx, trace
from sparsec.errors import PassError, RecipeError
from sparsec.passes.freeze import Freeze
from sparsec.pipeline import Context, Note

PATTERNS = ["2:4", "1:4", "2:5", "3:2:5", "4:2:5@strip", "4:2:5+2:4", "unstructured:0.7"]


def masked(net: type[nn.Module] = Residual, pattern: str = "2:4") -> Program:
    return PassManager.parse(f"mask{{pattern={pattern}}}").run(trace(made(net), (random(2, 6 if net is Tied else 5),)))


def frozen(program: Program) -> Program:
    return PassManager((Freeze(),)).run(program)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_are_folded_into_the_weights(pattern: str) -> None:
    before = masked(pattern=pattern)
    after = frozen(before)

    assert [] == list(after.module.named_buffers())
    assert [] == list(_fx.calls(after.module.graph, torch.ops.aten.where.ScalarOther))
    for site in before.sites:
        assert site.mask is not None
        mask, weight = _fx.get_tensor(before.module, site.mask), site.read(before.module)
        assert torch.equal(torch.where(mask, weight, 0.0), site.read(after.module))
        assert after.sites[site.name].mask is None
        assert after.sites[site.name].selection is site.selection


def test_what_is_not_kept_is_positive_zero_whatever_it_was() -> None:
    net = made(Residual)
    with torch.no_grad():
        net.up.weight.copy_(-torch.rand(8, 5, generator=torch.Generator().manual_seed(0)))
    program = PassManager.parse("mask{pattern=1:4}").run(trace(net, (random(2, 5),)))
    with torch.no_grad():
        dropped = ~_fx.get_tensor(program.module, "up.weight_mask")
        net.up.weight[dropped] = float("nan")  # after the choice: the mask must hide it

    weight = _fx.get_tensor(frozen(program).module, "up.weight")
    assert not weight[dropped].isnan().any()
    assert torch.equal(torch.zeros(int(dropped.sum())), weight[dropped])
    assert not torch.signbit(weight[dropped]).any()


def test_a_tied_weight_is_folded_once_for_all_users() -> None:
    before = masked(Tied)
    after, x = frozen(before), random(3, 6)

    assert ["first.weight"] == [name for name, p in after.module.named_parameters() if p.dim() == 2]
    assert torch.equal(before(x)["output"], after(x)["output"])


def test_the_given_program_and_its_model_keep_their_weights() -> None:
    net = made(Residual)
    weight = net.up.weight.detach().clone()
    program = PassManager.parse("mask{pattern=2:4}").run(trace(net, (random(2, 5),)))
    frozen(program)

    assert torch.equal(weight, net.up.weight)
    assert program.sites["up.weight"].mask is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_that_keeps_more_than_its_selection_is_refused_by_name(pattern: str) -> None:
    program = masked(pattern=pattern)
    _fx.get_tensor(program.module, "down.weight_mask").fill_(True)

    with pytest.raises(PassError, match=r"freeze: down\.weight: its mask is not that of its selection of "):
        Freeze().run(program, Context())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_that_keeps_less_than_its_selection_is_folded(pattern: str) -> None:
    program = masked(pattern=pattern)
    _fx.get_tensor(program.module, "down.weight_mask").fill_(False)

    assert not frozen(program).sites["down.weight"].read(frozen(program).module).any()


def test_a_site_without_mask_is_left_alone_and_reported() -> None:
    before = masked(Classifier)
    after, (report,) = PassManager((Freeze(),)).run_reported(before)

    assert (Note("head.weight", before.sites["head.weight"].excluded or ""),) == report.notes
    assert torch.equal(made(Classifier).head.weight, after.sites["head.weight"].read(after.module)[0])


def test_a_program_without_masks_is_refused() -> None:
    with pytest.raises(RecipeError, match="freeze requires a program that is masked"):
        frozen(trace(made(Residual), (random(2, 5),)))


def test_a_second_run_is_refused() -> None:
    with pytest.raises(RecipeError, match="freeze requires a program that is masked"):
        frozen(frozen(masked()))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_stay_exactly_the_same(pattern: str) -> None:
    before = masked(pattern=pattern)
    after = PassManager((Freeze(),)).run(before, check="outputs")

    assert "exact" == Freeze.equivalence
    for batch in (1, 5):
        x = random(batch, 5, seed=batch)
        assert torch.equal(before(x)["output"], after(x)["output"])
