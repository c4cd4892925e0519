"""Learnt masks: the gates' gradient against autograd, what they begin with, what is kept in the end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from training_models import engine, loop

from sparsec.errors import PatternError
from sparsec.pattern import NM
from sparsec.training.engine import Engine
from sparsec.training.gumbel import Gumbel, Learnable, Likeliest, ways
from sparsec.training.parts import WHOLE, Method

WEIGHT = [[4.0, -3.0, 2.0, 1.0, 0.5, 6.0], [1.0, 1.0, 1.0, 1.0, 2.0, -2.0]]
FLOAT32 = 1e-4  # of sums of tens of products, relative


def begun(**options: float) -> tuple[Engine, torch.nn.Parameter]:
    made, parameter = engine(WEIGHT, "2:4", Method(Learnable(), Gumbel(**{"gate_lr": 0.1} | options), Likeliest()))
    made.begin(10, 10)
    return made, parameter


def test_the_ways_of_two_of_four() -> None:
    assert [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]] == ways(
        NM(2, 4)
    ).tolist()


def test_gates_begin_at_the_mask_of_magnitude_by_hand() -> None:
    """Ways share 2, 1, 1, 1, 1, 0 weights with it, 1 in the mean: gates are prior * .01 * [1, 0, 0, 0, 0, -1]."""
    made, parameter = begun()
    state = made.sites[0].tensors
    expected = torch.tensor([0.03, 0, 0, 0, 0, -0.03])
    assert torch.allclose(expected, state["gate"][0, 0])

    likely = torch.softmax(100 * expected / 4, 0)
    mask = (likely[:, None] * ways(NM(2, 4))).sum(0)
    assert torch.allclose(mask * torch.tensor(WEIGHT[0][:4]), parameter[0, :4])
    assert torch.equal(torch.tensor(WEIGHT), state[WHOLE])


def test_the_gradient_of_the_gates_is_that_of_autograd() -> None:
    made, parameter = begun(keep_large=0.3)
    torch.manual_seed(1)
    made.post_step()
    site, share = made.sites[0], float(made.numbers["share"])
    assert 0.1 == share
    tau, kappa = 4 - 0.395, 140.0
    logits = site.tensors["likely"].log() * tau  # up to a constant of each group
    noise = (logits - kappa * site.tensors["gate"]).detach()
    gate = site.tensors["gate"].clone().requires_grad_()
    y = ((kappa * gate + noise) / tau).softmax(2)
    mask = (y @ ways(NM(2, 4))).flatten(1)[:, :6]
    masked = torch.tensor(WEIGHT) * mask
    assert torch.allclose(masked, parameter, atol=FLOAT32)
    target = torch.arange(12.0).view(2, 6)
    (expected,) = torch.autograd.grad((masked * target).sum() - 0.3 * masked.square().sum(), gate)

    parameter.grad = target.clone()
    made.pre_step()
    found = site.tensors["gate_mean"] / 0.1  # Adam's first mean is a tenth of it
    assert torch.allclose(expected, found, rtol=FLOAT32, atol=FLOAT32)
    assert parameter.grad is None
    moved = site.tensors["gate"] - gate.detach()
    assert torch.allclose(-0.1 * expected.sign() * (expected.abs() > 1e-3), moved * (expected.abs() > 1e-3), atol=1e-3)


def test_the_likeliest_way_is_kept_with_the_weights_untouched() -> None:
    made, parameter = begun()
    gate = made.sites[0].tensors["gate"].zero_()
    gate[0, 0, 4] = gate[1, 0, 2] = gate[0, 1, 0] = gate[1, 1, 0] = 1.0  # columns 1, 3; 0, 3; the tail's two
    kept = [[0.0, -3.0, 0.0, 1.0, 0.5, 6.0], [1.0, 0.0, 0.0, 1.0, 2.0, -2.0]]
    soft = parameter.detach().clone()
    with made.pruned():
        assert kept == parameter.tolist()
    assert torch.equal(soft, parameter.detach())
    made.end()

    assert kept == parameter.tolist()


def test_weights_stay_as_they_are_whatever_decays() -> None:
    made = loop(Method(Learnable(), Gumbel(0.05), Likeliest()), weight_decay=0.5)
    before: dict[str, Tensor] = {one.site.name: one.parameter.detach().clone() for one in made.engine.sites}
    biases = [p.detach().clone() for name, p in made.engine.program.module.named_parameters() if "bias" in name]
    for one in made.engine.sites:
        before[one.site.name] = one.tensors[WHOLE].clone()
    made.run()
    done = made.finish()

    for site in done.sites.sparse:
        weight = site.read(done.module)[0]
        assert torch.equal(before[site.name] * (weight != 0), weight)
    after = [p for name, p in done.module.named_parameters() if "bias" in name]
    assert not any(map(torch.equal, biases, after))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("2:16", f"each group of 2:16 has {math.comb(16, 2)}"),
        ("16:2:8", r"each block of 16:2:8 has 10\^14"),
        ("unstructured:0.5", "unstructured:0.5 has no groups of their own"),
        ("2:2:4@strip", "2:2:4@strip has no groups of their own"),
    ],
)
def test_too_many_ways_are_refused_with_their_number_and_the_limit(pattern: str, found: str) -> None:
    with pytest.raises(PatternError, match=f"weight: gumbel-mask learns .* at most 100 of a group; {found}"):
        engine([[1.0] * 16] * 2, pattern, Method(Learnable(), Gumbel(0.1), Likeliest()))
