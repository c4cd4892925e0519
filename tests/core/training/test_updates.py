"""The equations of the methods, on 2 x 8 weights worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from training_models import engine

from sparsec.errors import PatternError, UsageError
from sparsec.pattern import Pattern
from sparsec.training.engine import Engine
from sparsec.training.parts import Clock, Method, Tracked
from sparsec.training.schedules import Cubic, Once, Repeated
from sparsec.training.updates import Hard, Penalty, StraightThrough

WEIGHT = [[4.0, -3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, -8.0, 6.0, 7.0, 5.0]]
Z0 = [[4.0, -3.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0, -8.0, 0.0, 7.0, 0.0]]
"""2:4 of it: of equal weights the first are kept, also of zeros."""


def z_of(site: Tracked) -> Tensor:
    return Penalty(1.0).parts(site)[0]


def u_of(site: Tracked) -> Tensor:
    return Penalty(1.0).parts(site)[1]


def put(parameter: torch.nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def test_three_iterations_of_admm_by_hand() -> None:
    """Row 0: w stays; the third weight resists, so its u grows until w + u changes the choice of Pi."""
    made, parameter = engine([[4.0, -3.0, 2.0, 1.0] + [0.0] * 4, WEIGHT[1]], "2:4", Method(Repeated(1), Penalty(0.5)))
    made.begin(steps=4, per_epoch=4)
    (site,) = made.sites
    w, z = torch.tensor(WEIGHT), torch.tensor(Z0)
    assert torch.equal(z, z_of(site))
    assert torch.equal(w - z, u_of(site))  # [0, 0, 2, 1]

    parameter.grad = torch.ones_like(w)
    made.pre_step()
    assert torch.equal(1 + 0.5 * (w - z + w - z), parameter.grad)  # 1 + rho (w - z + u): [1, 1, 3, 2]
    assert [1.0, 1.0, 3.0, 2.0] == parameter.grad[0, :4].tolist()

    made.post_step()  # w + u = [4, -3, 4, 2]: now the third is kept in place of the second
    assert [4.0, 0.0, 4.0, 0.0] == z_of(site)[0, :4].tolist()
    assert [0.0, -3.0, 0.0, 2.0] == u_of(site)[0, :4].tolist()  # u + w - z = [0, 0, 2, 1] + [0, -3, -2, 1]
    made.post_step()  # w + u = [4, -6, 2, 3]
    assert [4.0, -6.0, 0.0, 0.0] == z_of(site)[0, :4].tolist()
    assert [0.0, 0.0, 2.0, 3.0] == u_of(site)[0, :4].tolist()
    made.post_step()  # w + u = [4, -3, 4, 4]
    assert [4.0, 0.0, 4.0, 0.0] == z_of(site)[0, :4].tolist()
    assert [0.0, -3.0, 0.0, 4.0] == u_of(site)[0, :4].tolist()

    made.end()
    assert Z0 == parameter.tolist()  # the final projection is of w, as in the paper's code


def test_the_residuals_of_admm_are_those_of_boyd() -> None:
    made, parameter = engine([[3.0, 2.0, 1.0, 0.0]], "2:4", Method(Repeated(1), Penalty(0.5)))
    made.begin(3, 3)  # z = [3, 2, 0, 0], u = [0, 0, 1, 0]
    put(parameter, torch.tensor([[3.0, 1.0, 2.0, 0.0]]))
    made.post_step()  # w + u = [3, 1, 3, 0]: z = [3, 0, 3, 0]; w - z = [0, 1, -1, 0]; z moved by [0, -2, 3, 0]

    assert pytest.approx(2**0.5 / 14**0.5) == made.curves["primal"][0][1]
    assert pytest.approx(0.5 * 13**0.5 / 14**0.5) == made.curves["dual"][0][1]
    assert [1, 0.5] == made.curves["rho"][0]


@pytest.mark.parametrize(("rho", "after"), [(1e-4, 2e-4), (1e3, 5e2), (0.5, 0.5)])
def test_a_balanced_rho_moves_by_two_and_u_against_it(rho: float, after: float) -> None:
    made, parameter = engine([[3.0, 2.0, 1.0, 0.0]], "2:4", Method(Repeated(1), Penalty(rho, "balanced")))
    made.begin(3, 3)
    put(parameter, torch.tensor([[3.0, 1.0, 2.0, 0.0]]))
    made.post_step()

    assert pytest.approx(after) == made.numbers["rho"]
    u = torch.tensor([[0.0, 1.0, 0.0, 0.0]])  # [0, 0, 1, 0] + [0, 1, -1, 0]
    assert torch.allclose(u * rho / after, u_of(made.sites[0]))


def test_admm_on_a_quadratic_closes_the_gap_and_beats_projecting_at_once() -> None:
    """min |A w - b|^2 under 2:4. The pull is as strong as the curvature: weaker, and masks swing to and fro."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 8, generator=generator), torch.randn(40, 2, generator=generator)
    best = torch.linalg.lstsq(a, b).solution.T
    made, parameter = engine(best.tolist(), "2:4", Method(Repeated(20), Penalty(100.0)))

    def loss(weight: Tensor) -> float:
        return float((a @ weight.T - b).square().sum())

    made.begin(2000, 2000)
    mask = Pattern.parse("2:4").project(best.abs())
    at_once = loss(best * Pattern.parse("2:4").mask(mask, 8)[0])
    for _ in range(1999):
        parameter.grad = 2 * (parameter.detach() @ a.T - b.T) @ a
        made.pre_step()
        put(parameter, parameter - 2e-3 * parameter.grad)
        made.post_step()
    gaps = [value for _, value in made.curves["primal"]]
    made.end()

    assert gaps[-1] < 0.01 < gaps[0]
    assert loss(parameter.detach()) < at_once


def test_the_gradient_of_sr_ste_by_hand() -> None:
    made, parameter = engine(WEIGHT, "2:4", Method(Repeated(1), StraightThrough(0.5)))
    made.begin(2, 2)
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    output = made.program(x)["output"]
    output.sum().backward()
    made.pre_step()

    assert [[4.0 - 6.0, 1.0 + 2.0 - 40.0 + 49.0]] == output.tolist()  # the masked weight computes
    assert parameter.grad is not None
    decay = 0.5 * (torch.tensor(WEIGHT) - torch.tensor(Z0))
    assert torch.equal(x.expand(2, -1) + decay, parameter.grad)  # all weights get its gradient
    assert WEIGHT == parameter.tolist()


def test_a_hard_mask_has_no_gradient_where_it_is_false() -> None:
    made, parameter = engine(WEIGHT, "2:4", Method(Once(), Hard()))
    made.begin(2, 2)
    made.program(torch.ones(1, 8))["output"].sum().backward()

    assert parameter.grad is not None
    assert made.sites[0].tensors["mask"].float().tolist() == parameter.grad.tolist()
    assert Z0 == parameter.tolist()


# Schedules ------------------------------------------------------------------------------------------------------------


def path(pattern: str) -> list[str]:
    made = engine([[1.0] * 16] * 4, pattern, Method(Cubic(0.0, 1.0, 1), Hard()))[0]
    (site,) = made.program.sites
    return [str(made.method.schedule.pattern(site, Clock(10, 10, step))) for step in range(11)]


@pytest.mark.parametrize(
    ("pattern", "stages"),
    [
        ("2:4", ["None", "3:4", "2:4"]),
        ("1:4", ["None", "3:4", "2:4", "1:4"]),
        ("4:2:8", ["None", "4:2:4", "4:2:5", "4:2:6", "4:2:7", "4:2:8"]),
        ("4:2:6@strip", ["None", "4:2:4@strip", "4:2:5@strip", "4:2:6@strip"]),
    ],
)
def test_the_cubic_path_ends_in_the_pattern(pattern: str, stages: list[str]) -> None:
    found = list(dict.fromkeys(path(pattern)))

    assert stages[-1] == found[-1]
    assert found == [stage for stage in stages if stage in found]
    assert len(found) > 2


def test_densities_follow_the_cubic_formula() -> None:
    made = engine([[1.0] * 16] * 4, "unstructured:0.8", Method(Cubic(0.0, 1.0, 1), Hard()))[0]
    (site,) = made.program.sites
    half = made.method.schedule.pattern(site, Clock(10, 10, 5))

    assert half is not None
    assert pytest.approx(0.2 + 0.8 * 0.5**3) == half.density
    assert "unstructured:0.8" == str(made.method.schedule.pattern(site, Clock(10, 10, 10)))


def test_gradual_pruning_of_an_intersection_is_refused_by_name() -> None:
    with pytest.raises(PatternError, match=r"weight: gradual pruning is defined for .*, found 4:2:5\+2:4"):
        engine([[1.0] * 16] * 4, "4:2:5+2:4", Method(Cubic(), Hard()))


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        (Cubic(0.0, 0.5, 10), 10, "the pattern cannot be reached gradually: of 10 steps, 5 lie between"),
        (Repeated(20), 10, "masks would never be chosen anew: 10 steps of 5 an epoch, of which 10"),
        (Repeated(0, 2), 10, "of which 0 before they are frozen"),
    ],
)
def test_a_schedule_that_cannot_end_is_refused(schedule: Cubic | Repeated, steps: int, message: str) -> None:
    made: Engine = engine([[1.0] * 16] * 4, "2:4", Method(schedule, Hard()))[0]

    with pytest.raises(UsageError, match=message):
        made.begin(steps, 5)
