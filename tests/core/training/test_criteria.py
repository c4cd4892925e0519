"""Scores over three steps on 2 x 4 weights, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training_models import engine

from sparsec.errors import UsageError
from sparsec.training.criteria import Movement, Platon, Seven
from sparsec.training.engine import Engine
from sparsec.training.parts import Criterion, Method
from sparsec.training.regrowth import Scored, Zeroed
from sparsec.training.schedules import Cubic, Once
from sparsec.training.updates import Hard

WEIGHT = [[2.0, -2.0, 1.0, 1.0], [1.0, 1.0, 1.0, -3.0]]
STEPS = [
    [[1.0, 1.0, 4.0, 0.0], [1.0, 2.0, 0.5, -1.0]],
    [[1.0, -2.0, 0.0, 0.0], [1.0, 2.0, 0.5, 1.0]],
    [[1.0, 0.0, 2.0, 0.0], [1.0, 2.0, 0.5, -1.0]],
]
ROUNDING = 1e-5  # of a few float32 operations on numbers near 10


def observed(criterion: Criterion, pattern: str = "2:4") -> tuple[Engine, Tensor]:
    """An engine whose criterion saw STEPS at the same weights, and the scores."""
    made, parameter = engine(WEIGHT, pattern, Method(Cubic(0.0, 1.0, 10), Hard(), criterion))
    made.begin(10, 10)
    for step in STEPS:
        parameter.grad = torch.tensor(step)
        made.observe()
    return made, criterion.score(made.sites[0], parameter.detach())


def test_seven_over_three_steps_by_hand() -> None:
    """A steady gradient's ratio m / sqrt(v) is 1, whatever its sign; that of 1, 2 is .56/.36 / sqrt(.49/.19)."""
    _, found = observed(Seven(0.8, 0.9))
    ratio = (0.56 / 0.36) / (0.49 / 0.19) ** 0.5
    fading = 4 + 2 * ((4 * 0.2 * 0.64 + 2 * 0.2) / 0.488) / ((16 * 0.1 * 0.81 + 4 * 0.1) / 0.271) ** 0.5
    expected = [[2 * 3.0, 2 * (1 + 2 * ratio), fading, 0.0], [3.0, 6.0, 1.5, 9.0]]

    assert torch.allclose(torch.tensor(expected), found, rtol=ROUNDING)


def test_platon_over_three_steps_by_hand() -> None:
    """Sensitivities 4, 0, 2: A is 2, 1, 1.5; U is 1, 1, .75. Steady ones of 2: A is 1, 1.5, 1.75; U .5, .5, .375."""
    _, found = observed(Platon(0.5, 0.5, window=1))

    assert [1.5 * 0.75, 1.75 * 0.375] == [float(found[0, 2]), float(found[0, 0])]
    assert 0.0 == float(found[0, 3])


def test_platon_averages_a_window_and_reads_what_there_is_of_the_first() -> None:
    """Of a window of 2: I = (4 + 0) / 2, A = 1, U = .5; the third step is not in it yet."""
    _, found = observed(Platon(0.5, 0.5, window=2))
    assert 1.0 * 0.5 == float(found[0, 2])

    made, begun = observed(Platon(0.5, 0.5, window=5))
    assert pytest.approx((4 + 0 + 2) / 5) == float(begun[0, 2])
    assert not made.sites[0].tensors["average"].any()


def test_movement_over_three_steps_by_hand() -> None:
    """S = - sum of w g, counted from the least: weights that training moves away from zero have the most."""
    _, found = observed(Movement())
    movement = torch.tensor([[-6.0, -2.0, -6.0, 0.0], [-3.0, -6.0, -1.5, -3.0]])

    assert torch.equal(movement + 6, found)


@pytest.mark.parametrize("criterion", [Seven(normalise="row"), Platon(window=1, normalise="row")])
def test_rows_that_share_columns_are_made_comparable(criterion: Criterion) -> None:
    _, found = observed(criterion, "2:2:4")
    _, plain = observed(criterion, "2:4")

    assert torch.allclose(torch.ones(2), found.mean(1), rtol=ROUNDING)
    assert torch.equal(plain.argsort(1), found.argsort(1))
    assert not torch.allclose(torch.ones(2), plain.mean(1), rtol=0.1)


def test_movement_ranks_rows_that_share_columns() -> None:
    _, found = observed(Movement(), "2:2:4")

    assert [0.0, 0.25, 0.5, 0.75] == found[0].sort().values.tolist()


def test_what_seven_pruned_scores_below_what_it_kept_even_without_gradients() -> None:
    made, _ = observed(Seven())
    site = made.sites[0]
    site.tensors["mask"] = torch.tensor([[False, True, True, True], [True] * 4])
    found = made.method.criterion.score(site, site.parameter.detach())

    assert 0.0 == float(found[0, 0]) < float(found[0, 3]) < 1e-20
    assert float(found[0, 1]) > 1


def test_platon_zeroes_what_it_does_not_choose_and_trains_it_on() -> None:
    """Half-way, 3 of 4 are kept: sensitivities are 2, 2, 4, 0 and 1, 2, .5, 3."""
    made, parameter = engine(WEIGHT, "2:4", Method(Cubic(0.0, 1.0, 2), Zeroed(), Platon(window=1)))
    made.begin(4, 8)
    for _ in range(2):
        parameter.grad = torch.tensor(STEPS[0])
        made.observe()
        made.pre_step()
        made.post_step()

    assert [[2.0, -2.0, 1.0, 0.0], [1.0, 1.0, 0.0, -3.0]] == parameter.tolist()
    made.program(torch.ones(1, 4))["output"].sum().backward()
    assert torch.equal(torch.tensor(STEPS[0]) + 1, parameter.grad)  # masked ones have theirs too


def test_movement_sees_the_gradient_that_the_optimizer_does_not() -> None:
    made, parameter = engine(WEIGHT, "2:4", Method(Cubic(0.0, 1.0, 1), Scored(), Movement()))
    made.begin(10, 10)
    made.sites[0].tensors["mask"] = parameter.detach() > 0
    made._act()
    made.program(torch.ones(1, 4))["output"].sum().backward()
    made.observe()
    assert torch.equal(-parameter.detach(), made.sites[0].tensors["movement"])
    made.pre_step()

    assert parameter.grad is not None
    assert torch.equal((parameter.detach() > 0).float(), parameter.grad)


@pytest.mark.parametrize("criterion", [Seven(), Platon(), Movement()])
def test_a_mask_before_any_gradient_is_refused(criterion: Criterion) -> None:
    made, _ = engine(WEIGHT, "2:4", Method(Once(), Hard(), criterion))

    with pytest.raises(UsageError, match="weight cannot be pruned yet: its scores are made of gradients"):
        made.begin(2, 2)
