"""One matrix: every solver, pattern and calibration gives what it says."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from core.oneshot.problems import gram, inputs, loss, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import sparse_patterns
from torch import Tensor

from sparsec.errors import PatternError, SparsecError
from sparsec.oneshot.moments import Collector, Moments
from sparsec.oneshot.scores import NAMES, SCORES
from sparsec.oneshot.solving import SOLVERS, Method, Solved, Solver, solve
from sparsec.pattern import NM, VNM, Pattern, Strip, Unstructured

PATTERNS = ["2:4", "1:4", "2:5", "8:16", "4:2:5", "64:2:8", "4:2:5@strip", "4:2:5+2:4", "unstructured:0.6"]
FP32 = 1e-4  # of the outputs: fp32 moments of 300 tokens
ROUNDING = 1 + 1e-4  # of an objective, from the fp32 sums that solvers work with
ROWS, COLS, TOKENS = 8, 22, 300
DAMPING = Method().damping
DENSE = weight(ROWS, COLS)
X = inputs(TOKENS, COLS) + 0.5
X0 = X + 0.1 * inputs(TOKENS, COLS, seed=1)


def moments(x: Tensor, x0: Tensor | None = None) -> Moments:
    collector = Collector(x.shape[1], "gram" if x0 is None else "cross")
    collector.add(x, x0)
    return collector.finish("here")


def runs(solver: Solver, pattern: Pattern) -> bool:
    return solver != "sparsegpt" or isinstance(pattern, (NM, VNM, Strip))


def prune(
    pattern: str, solver: Solver = "alps", found: Moments | None = None, bias: bool = False, **how: object
) -> Solved:
    method = dataclasses.replace(Method(solver), **how)  # type: ignore[arg-type]
    return solve(DENSE, Pattern.parse(pattern), method, found or moments(X), None, bias)


def check(solved: Solved, pattern: Pattern, dense: Tensor = DENSE) -> None:
    mask = pattern.mask(solved.selection, dense.shape[1])[0]
    assert dense.shape == solved.weight.shape
    assert dense.dtype == solved.weight.dtype
    assert 0 == pattern.violations_of(solved.weight[None], solved.selection).count
    assert not solved.weight[~mask].any()
    assert not torch.signbit(solved.weight[~mask]).any()  # zeros are +0
    assert torch.isfinite(solved.weight).all()
    assert solved.retained is None or 0 < solved.retained <= 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_is_the_selection_and_the_rest_is_zero(
    solver: Solver, text: str, crossed: bool, bias: bool
) -> None:
    pattern = Pattern.parse(text)
    if not runs(solver, pattern):
        with pytest.raises(PatternError, match=rf"{re.escape(text)}: solver sparsegpt .*; use alps or refit"):
            prune(text, solver)
        return
    found = moments(X, X0 if crossed else None)
    for dense in (DENSE, DENSE.bfloat16()):
        solved = solve(dense, pattern, Method(solver), found, None, bias)
        check(solved, pattern, dense)
        assert (bias and solver != "none") == (solved.bias_shift is not None)
        assert (solver == "none") == (solved.error is None)
        assert (solver in ("none", "refit")) == (solved.retained is not None)  # the others have no score


@given(sparse_patterns(), st.integers(1, 12), st.integers(1, 45), st.integers(0, 10**6), st.sampled_from(SOLVERS))
def test_every_tail_of_every_pattern_is_legal(
    pattern: Pattern, rows: int, cols: int, seed: int, solver: Solver
) -> None:
    if not runs(solver, pattern):
        return
    dense, found = weight(rows, cols, seed), moments(inputs(30, cols, seed))
    solved = solve(dense, pattern, Method(solver), found, None, False)
    mask = pattern.mask(solved.selection, cols)[0]

    assert 0 == pattern.violations_of(solved.weight[None], solved.selection).count
    assert not solved.weight[~mask].any()


@pytest.mark.parametrize("varies", [0.0, 1e-4, 1e-3])
@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_vary_less_than_their_squares_round_are_pruned_too(solver: Solver, varies: float) -> None:
    pattern, cols = Pattern.parse("4:2:5"), 56
    for seed in range(5):
        dense = weight(ROWS, cols, seed)
        x = inputs(1, cols, seed).expand(TOKENS, cols) + varies * inputs(TOKENS, cols, seed + 1)
        found = moments(x, x + varies * inputs(TOKENS, cols, seed + 2))
        check(solve(dense, pattern, Method(solver), found, None, True), pattern, dense)


# Error and bias -------------------------------------------------------------------------------------------------------


def outputs_differ(kept: Tensor, x: Tensor, centred: bool) -> tuple[float, float]:
    """Norm of the change of the outputs, and of the outputs; about their means where a bias is free."""
    before, after = x.double() @ DENSE.double().T, x.double() @ kept.double().T
    if centred:
        after, before = after - after.mean(0), before - before.mean(0)
    return float((after - before).norm()), float(before.norm())


@pytest.mark.parametrize("solver", ["refit", "sparsegpt", "alps"])
@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_error_is_that_of_the_outputs_on_the_pruned_layers_inputs(
    solver: Solver, crossed: bool, bias: bool
) -> None:
    solved = prune("2:4", solver, moments(X, X0) if crossed else moments(X), bias=bias)
    lost, all_of_it = outputs_differ(solved.weight, X, bias)

    assert solved.error is not None and solved.error > 0.05
    assert pytest.approx(lost / all_of_it, rel=FP32) == solved.error


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("solver", ["refit", "sparsegpt", "alps"])
def test_a_corrected_bias_gives_the_dense_layers_mean_output(solver: Solver, crossed: bool) -> None:
    solved = prune("2:4", solver, moments(X, X0) if crossed else moments(X), bias=True)
    wanted = (X0 if crossed else X).double() @ DENSE.double().T

    assert solved.bias_shift is not None
    found = X.double() @ solved.weight.double().T + solved.bias_shift.double()
    torch.testing.assert_close(found.mean(0), wanted.mean(0), rtol=FP32, atol=FP32)


def test_without_bias_correction_the_bias_stays() -> None:
    method = Method("alps", bias=False)

    assert solve(DENSE, Pattern.parse("2:4"), method, moments(X), None, True).bias_shift is None


@pytest.mark.parametrize("solver", ["refit", "sparsegpt", "alps"])
def test_asymmetric_calibration_comes_closer_to_the_dense_outputs(solver: Solver) -> None:
    wanted = X0.double() @ DENSE.double().T
    errors = [
        float((X.double() @ prune("2:4", solver, found).weight.double().T - wanted).norm())
        for found in (moments(X, X0), moments(X))
    ]

    assert errors[0] < errors[1]


# Quality --------------------------------------------------------------------------------------------------------------


@given(
    st.one_of(sparse_patterns()),
    st.integers(1, 24),
    st.integers(1, 64),
    st.integers(0, 10**6),
    st.floats(0, 2),
    st.sampled_from(["sparsegpt", "alps"]),
)
@settings(max_examples=100)
def test_no_solver_is_worse_than_magnitude_with_refit(
    pattern: Pattern, rows: int, cols: int, seed: int, spread: float, solver: Solver
) -> None:
    if not runs(solver, pattern):
        return
    dense, matrix = weight(rows, cols, seed), gram(cols, seed, spread, damping=0)
    found = Moments(100, torch.zeros(cols, dtype=torch.float64), matrix)
    hessian = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(cols)
    errors = [
        loss(dense, solve(dense, pattern, Method(which), found, None, False).weight, hessian)
        for which in (solver, "refit")
    ]

    assert errors[0] <= errors[1] * ROUNDING + 1e-6 * loss(dense, torch.zeros_like(dense), hessian)


@pytest.mark.parametrize("text", ["2:4", "8:16", "64:2:5", "64:2:8", "64:2:5@strip", "unstructured:0.6"])
def test_large_layers_are_ordered_magnitude_refit_sparsegpt_alps(text: str) -> None:
    dense, pattern = weight(128, 160), Pattern.parse(text)
    x = inputs(500, 160)
    found = moments(x)
    solvers = [solver for solver in SOLVERS if runs(solver, pattern)]
    methods = [Method(solver, damping=0.01) for solver in solvers]  # three tokens a weight: little damping is right
    errors = [
        loss(dense, solve(dense, pattern, method, found, None, False).weight, x.T @ x / len(x)) for method in methods
    ]

    assert sorted(errors, reverse=True) == errors
    assert errors[-1] < 0.9 * errors[1]


def test_a_refit_after_sparsegpt_loses_less() -> None:
    hessian = X.T @ X / len(X)
    errors = [loss(DENSE, prune("2:5", "sparsegpt", refit=refit).weight, hessian) for refit in (True, False)]

    assert errors[0] < errors[1]


# Strange data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_inputs_that_are_always_zero_are_no_obstacle(solver: Solver, text: str) -> None:
    pattern, x = Pattern.parse(text), X.clone()
    x[:, [1, 5, 6, 7]] = 0
    if runs(solver, pattern):
        check(prune(text, solver, moments(x)), pattern)


@pytest.mark.parametrize("score", [name for name in NAMES if SCORES[name].needs in ("nothing", "squares", "gram")])
@pytest.mark.parametrize("solver", SOLVERS)
def test_without_any_input_the_largest_weights_stay_and_a_note_says_so(solver: Solver, score: str) -> None:
    solved = prune("2:4", solver, moments(0 * X), score=score)
    pattern = Pattern.parse("2:4")

    assert torch.equal(DENSE.where(pattern.mask(pattern.project(DENSE.abs()), COLS)[0], 0.0), solved.weight)
    if solver != "none":
        assert "its inputs are always 0, so weights were chosen by magnitude" == solved.note


@pytest.mark.parametrize("solver", ["refit", "sparsegpt", "alps"])
def test_fewer_tokens_than_columns_are_enough(solver: Solver) -> None:
    check(prune("2:4", solver, moments(X[:3])), Pattern.parse("2:4"))


def indefinite(level: float) -> Moments:
    """A Gram matrix that no data gives: its smallest eigenvalue is below 0, as rounding can make it."""
    matrix = torch.eye(COLS)
    matrix[0, 1] = matrix[1, 0] = 1 + level
    return Moments(9, torch.zeros(COLS, dtype=torch.float64), matrix)


@pytest.mark.parametrize("solver", ["sparsegpt", "refit"])
def test_damping_is_raised_where_the_gram_matrix_is_singular_and_a_note_says_so(solver: Solver) -> None:
    solved = prune("2:4", solver, indefinite(0.5), score="obs")

    assert "the Gram matrix of its inputs is singular; damping was raised to 1" == solved.note
    check(solved, Pattern.parse("2:4"))


def test_a_score_alone_says_that_damping_was_raised() -> None:
    assert "damping was raised to 1" in prune("2:4", "none", indefinite(0.5), score="obs").note


def test_a_gram_matrix_that_stays_singular_is_an_error() -> None:
    with pytest.raises(SparsecError, match="stays singular with damping 1000"):
        prune("2:4", "sparsegpt", indefinite(1e6))


# Scores ---------------------------------------------------------------------------------------------------------------


def test_scores_are_their_formulas() -> None:
    size, norm = DENSE.abs(), X.square().mean(0).sqrt()
    gradients = weight(ROWS, COLS, 5).abs()
    hessian = X.T @ X / TOKENS
    inverse = torch.linalg.inv(hessian + DAMPING * hessian.diagonal().mean() * torch.eye(COLS)).diagonal()
    relative = size / size.sum(0) + size / size.sum(1, keepdim=True)
    expected = {
        "magnitude": size,
        "wanda": size * norm,
        "ria": relative * (norm * TOKENS**0.5) ** 0.5,
        "obs": DENSE.square() / inverse,
        "taylor": gradients,
        "fisher": gradients,
        "seven": gradients,
    }
    assert set(NAMES) == set(expected)
    for pattern in (NM(2, 4), Unstructured(0.5)):
        for name in NAMES:
            found = solve(DENSE, pattern, Method("none", name), moments(X), gradients, False)
            mask = pattern.mask(found.selection, COLS)[0]
            share = float(expected[name][mask].sum() / expected[name].sum())
            assert torch.equal(pattern.mask(pattern.project(expected[name]), COLS)[0], mask), name
            assert pytest.approx(share, rel=1e-4) == found.retained


def test_row_normalisation_keeps_one_loud_row_from_choosing_the_columns() -> None:
    dense, pattern = DENSE.clone(), Pattern.parse("8:2:11")
    dense[0] *= 1e6
    for how in ("row", "rank"):
        found, other = (
            solve(one, pattern, Method("none", normalise=how), None, None, False)  # type: ignore[arg-type]
            for one in (dense, DENSE)
        )
        assert found.selection.columns is not None and other.selection.columns is not None
        assert torch.equal(found.selection.columns, other.selection.columns)
