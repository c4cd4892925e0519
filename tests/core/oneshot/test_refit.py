"""Least squares of the kept weights, and ALPS."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from core.oneshot.problems import gram, least_squares, loss, weight
from hypothesis import given
from hypothesis import strategies as st
from strategies import scores, shapes, sparse_patterns
from torch import Tensor

from sparsec.errors import PatternError
from sparsec.oneshot.alps import alps
from sparsec.oneshot.refit import STEPS, solve
from sparsec.oneshot.selecting import Projection, selection_of
from sparsec.pattern import Pattern
from sparsec.strips import strip_columns
from sparsec.vnm import Strip

SEEDS, ROWS, COLS = st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 30)
ROUNDING = 1 + 1e-4  # of the objective, where conjugate gradients have nothing left to gain


def refit(dense: Tensor, hessian: Tensor, mask: Tensor, steps: int = STEPS) -> Tensor:
    return solve(dense @ hessian, hessian, mask, dense, steps)


@given(st.integers(1, 6), st.integers(1, 12), SEEDS)
def test_refit_is_least_squares_on_small_layers(rows: int, cols: int, seed: int) -> None:
    dense, hessian = weight(rows, cols, seed), gram(cols, seed)
    mask = weight(rows, cols, seed + 1) > 0
    found = refit(dense, hessian, mask, steps=60)
    energy = loss(dense, torch.zeros_like(dense), hessian)

    assert not found[~mask].any()
    expected = loss(dense, least_squares(dense, hessian, mask).float(), hessian)
    assert pytest.approx(expected, rel=1e-3, abs=1e-4 * energy) == loss(dense, found, hessian)


@given(ROWS, COLS, SEEDS)
def test_every_step_of_refit_lowers_the_error(rows: int, cols: int, seed: int) -> None:
    dense, hessian = weight(rows, cols, seed), gram(cols, seed)
    mask = weight(rows, cols, seed + 1) > 0
    errors = [loss(dense, refit(dense, hessian, mask, steps), hessian) for steps in range(8)]

    assert loss(dense, dense.where(mask, 0.0), hessian) == errors[0]
    assert all(after <= before * ROUNDING + 1e-9 for before, after in pairwise(errors))


def test_refit_leaves_its_start_as_it_is_and_stops_where_nothing_is_to_gain() -> None:
    dense, hessian = weight(4, 10), gram(10)
    start = dense.clone()
    everything = torch.ones_like(dense, dtype=torch.bool)

    torch.testing.assert_close(dense, refit(dense, hessian, everything))
    assert not refit(dense, hessian, ~everything).any()
    refit(dense, hessian, dense > 0)
    assert torch.equal(start, dense)


@given(st.data())
def test_a_transposed_projection_is_the_patterns_own(data: st.DataObject) -> None:
    """Asked often: strips then keep their columns, all else is as if asked once."""
    pattern, solver = data.draw(sparse_patterns()), data.draw(st.sampled_from(["l1", "l2", "greedy"]))
    score = data.draw(scores((1, *data.draw(shapes())[1:])))
    found = Projection(pattern, solver)(score[0].T)

    if not isinstance(pattern, Strip):
        assert torch.equal(pattern.mask(pattern.project(score, solver), score.shape[2])[0], found.T)
        return
    columns = strip_columns(score[0], pattern.v, pattern.m, solver, rounds=1)
    selection, mask = selection_of(pattern, found.T.float(), columns)
    assert torch.equal(found.T, mask)
    assert torch.equal(found.T, pattern.mask(selection, score.shape[2])[0])


def test_trying_every_quad_is_refused_where_there_are_too_many() -> None:
    with pytest.raises(PatternError, match=r"4:2:13: the exact column solver is limited to M <= 12; use greedy"):
        Projection(Pattern.parse("4:2:13"), "exact")


@given(sparse_patterns(), ROWS, COLS, SEEDS)
def test_alps_keeps_the_pattern_at_every_tail(pattern: Pattern, rows: int, cols: int, seed: int) -> None:
    dense, hessian = weight(rows, cols, seed), gram(cols, seed)
    project = Projection(pattern, "greedy")
    kept = alps(dense, hessian, dense @ hessian, project)
    selection, mask = selection_of(pattern, kept, project.columns)

    assert torch.equal(mask, pattern.mask(selection, cols)[0])
    assert 0 == pattern.violations_of(mask[None].float(), selection).count
    assert not kept[~mask].any()
    assert torch.isfinite(kept).all()
    assert isinstance(pattern, Strip) == (project.columns is not None)


@pytest.mark.parametrize("text", ["2:4", "4:2:5", "4:2:5@strip", "unstructured:0.6"])
def test_alps_is_deterministic(text: str) -> None:
    dense, hessian = weight(16, 40), gram(40)
    results = [alps(dense, hessian, dense @ hessian, Projection(Pattern.parse(text), "greedy")) for _ in range(2)]

    assert torch.equal(results[0], results[1])


def test_alps_keeps_weighted_magnitude_where_inputs_are_independent() -> None:
    dense, sizes = weight(8, 16), weight(1, 16, 1)[0].exp()
    kept = alps(dense, sizes.diag(), dense * sizes, Projection(Pattern.parse("2:4"), "greedy"))
    pattern = Pattern.parse("2:4")
    mask = pattern.mask(pattern.project(dense.square() * sizes), 16)[0]

    assert torch.equal(mask, kept != 0)
    torch.testing.assert_close(dense.where(mask, 0.0), kept)
