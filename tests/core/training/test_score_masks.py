"""Mask training by hand: where scores begin, their gradient, what they keep, and the path."""

from __future__ import annotations

import pytest
import torch
from training_models import engine

from sparsec.errors import PatternError, UsageError
from sparsec.training.engine import Engine
from sparsec.training.parts import Clock, Method
from sparsec.training.score_masks import Init, Learnt, Path, Scores

WEIGHT = [[4.0, -3.0, 2.0, 1.0], [1.0, 5.0, -6.0, 0.5]]
KEPT = [[True, True, False, False], [False, True, True, False]]


def begun(
    pattern: str = "2:4", init: Init = "soft", weight: list[list[float]] = WEIGHT, start_step: int = 0
) -> tuple[Engine, torch.nn.Parameter]:
    method = Method(Path(0.0, 1.0, 1, start_step, init), Scores(0.1, init, start_step), Learnt(), columns="l1")
    made, parameter = engine(weight, pattern, method)
    made.begin(10, 10)
    return made, parameter


def test_scores_begin_as_magnitudes_or_as_two_numbers() -> None:
    soft, hard = begun()[0].sites[0].tensors, begun(init="hard")[0].sites[0].tensors

    assert torch.equal(torch.tensor(WEIGHT).abs(), soft["score"])
    assert torch.equal(torch.tensor(KEPT) * 0.02, hard["score"])
    assert KEPT == soft["mask"].tolist() == hard["mask"].tolist()


def test_the_gradient_of_a_score_is_that_of_the_masked_weight_times_the_weight() -> None:
    """y = W' x: dL/dW' = target^T x, masked or not; Adam's first step is the rate, against its sign."""
    made, parameter = begun()
    x, target = torch.tensor([[1.0, -2.0, 3.0, 0.5]]), torch.tensor([[1.0, -1.0]])
    (y,) = made.program(**dict.fromkeys(made.program.inputs, x)).values()
    assert torch.equal(torch.tensor([[4.0 + 6.0, -10.0 - 18.0]]), y.detach())
    (y * target).sum().backward()
    made.pre_step()

    state, gradient = made.sites[0].tensors, (target.T @ x) * torch.tensor(WEIGHT)
    assert torch.allclose(gradient, state["score_mean"] / 0.1)
    assert torch.allclose(gradient.square(), state["score_square"] / 0.001)
    assert torch.allclose(torch.tensor(WEIGHT).abs() - 0.1 * gradient.sign(), state["score"])
    assert parameter.grad is None
    assert torch.equal(torch.tensor(WEIGHT), parameter.detach())


def test_the_rate_falls_to_zero() -> None:
    made, parameter = begun()
    score = made.sites[0].tensors["score"]
    moves = []
    for _ in range(10):
        before = score.clone()
        parameter.grad = torch.ones_like(parameter)
        made.pre_step()
        made.post_step()
        moves.append(float((before - score)[0, 0]))

    assert pytest.approx([0.1 * (1 - step / 10) for step in range(10)], rel=1e-3) == moves


@pytest.mark.parametrize(
    ("pattern", "score", "kept"),
    [
        ("2:4", [[-1.0, -2.0, -3.0, -4.0], [0.0, -1.0, 9.0, 1.0]], [[1, 1, 0, 0], [0, 0, 1, 1]]),
        ("unstructured:0.5", [[-1.0, -2.0, -3.0, -4.0], [0.0, -1.5, 9.0, 1.0]], [[1, 0, 0, 0], [1, 0, 1, 1]]),
    ],
)
def test_each_matrix_keeps_its_largest_scores_negative_ones_too(
    pattern: str, score: list[list[float]], kept: list[list[int]]
) -> None:
    made, parameter = begun(pattern)
    made.sites[0].tensors["score"].copy_(torch.tensor(score))
    made.post_step()
    expected = torch.tensor(kept).bool()
    assert torch.equal(expected, made.sites[0].tensors["mask"])
    assert torch.equal(torch.tensor(WEIGHT), parameter.detach())
    made.end()

    assert torch.equal(torch.tensor(WEIGHT) * expected, parameter.detach())


def test_a_block_keeps_the_columns_of_the_largest_sums() -> None:
    """Sums are 0, 1, 2, -3, 4, 5: columns 1, 2, 4, 5, though column 3 has the largest score of all."""
    made, _ = begun("2:2:6", weight=[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]] * 2)
    score = torch.tensor([[0.0, 3.0, 1.0, 9.0, 2.0, 1.0], [0.0, -2.0, 1.0, -12.0, 2.0, 4.0]])
    made.sites[0].tensors["score"].copy_(score)
    made.post_step()

    assert [[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]] == made.sites[0].tensors["mask"].int().tolist()


def test_before_the_start_step_the_dense_model_is_trained() -> None:
    made, parameter = begun(start_step=2)
    for _ in range(2):
        assert {} == made.sites[0].tensors
        parameter.grad = torch.ones_like(parameter)
        made.pre_step()
        assert parameter.grad is not None
        parameter.detach().mul_(-2)
        made.post_step()

    assert torch.equal(4 * torch.tensor(WEIGHT).abs(), made.sites[0].tensors["score"])
    parameter.grad = torch.ones_like(parameter)
    made.pre_step()
    assert parameter.grad is None
    assert pytest.approx(16.0 - 0.1) == float(made.sites[0].tensors["score"][0, 0])  # the rate begins whole


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("unstructured:0.9", ["None", "unstructured:0.7", "unstructured:0.875", "unstructured:0.9"]),
        ("1:16", ["None", "5:16", "2:16", "1:16"]),
        ("16:2:16", ["None", "16:2:6", "16:2:13", "16:2:16"]),
        ("2:4", ["None", "2:4", "2:4", "2:4"]),
    ],
)
def test_the_path_by_hand(pattern: str, found: list[str]) -> None:
    """From .3, t = 0, 1/2 and 1 at steps 10, 15, 20: .1 + .2/8 = .125; .0625 + .2375/8 = .0922; .1469."""
    path = Path(0.3, 0.5, 1, 10)
    made, _ = engine([[1.0] * 16] * 16, pattern, Method(path, Scores(0.1), Learnt()))
    site = made.sites[0].site
    steps = [path.pattern(site, Clock(40, 40, step)) for step in (9, 10, 15, 20)]

    assert found == [str(one) for one in steps]


def test_hard_scores_are_refused_where_ties_would_decide() -> None:
    with pytest.raises(
        UsageError, match=r"weight: init=hard keeps the largest weights, but \d+% of what it would keep"
    ):
        begun(init="hard", weight=[[0.0] * 8 + [1.0] * 8] * 4, pattern="unstructured:0.8")
    with pytest.raises(PatternError, match=r"weight: init=hard gives all kept .* found start_density 0.3 and unstr"):
        engine(WEIGHT, "unstructured:0.9", Method(Path(0.3, 1.0, init="hard"), Scores(0.1, "hard"), Learnt()))
    begun(init="hard", weight=[[0.0] * 8 + [1.0] * 8] * 4, pattern="unstructured:0.5")


@pytest.mark.parametrize("path", [Path(0.3, 0.5, 1, 5), Path(0.0, 0.5, 1, 10), Path(0.3, 0.5, 6)])
def test_a_training_that_is_too_short_is_refused(path: Path) -> None:
    with pytest.raises(UsageError, match=r"masks cannot be trained: of 10 steps, scores begin with start_step"):
        path.check(Clock(10, 10))
    Path(0.0, 0.5, 1, 9).check(Clock(10, 10))
