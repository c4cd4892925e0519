"""Prune one matrix: the solvers by name, and what all of them must give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sparsec.columns import Solver as Columns
from sparsec.errors import PatternError, SparsecError
from sparsec.intersection import Intersection
from sparsec.oneshot import refit
from sparsec.oneshot.alps import alps
from sparsec.oneshot.moments import Moments, Need
from sparsec.oneshot.problem import Given, Problem
from sparsec.oneshot.scores import SCORES, Facts, Normalise, Score, normalised
from sparsec.oneshot.selecting import Projection, selection_of
from sparsec.oneshot.sweep import sweep, sweep_strips
from sparsec.pattern import NM, VNM, Pattern, Strip
from sparsec.selection import Selection
from sparsec.strips import strip_columns

if TYPE_CHECKING:
    from torch import Tensor

Solver = Literal["none", "refit", "sparsegpt", "alps"]
"""none: the score's mask, weights as they are. refit: the score's mask, kept weights by least squares. sparsegpt, alps:
masks and weights of their own."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Calibration = Literal["asymmetric", "sequential", "independent"]
"""Inputs of the pruned layers before it and outputs of the dense model; both of the pruned layers; both dense."""
_RAISES = 5  # times that damping is multiplied by 10 before a singular Gram matrix is given up
_SMALL = 1 << 13  # weights of a matrix for which magnitude is tried as well


@dataclass(frozen=True)
class Method:
    """How weights are chosen and changed."""

    solver: Solver = "alps"
    score: Score = "magnitude"
    columns: Columns = "greedy"
    normalise: Normalise = "none"
    calibration: Calibration = "asymmetric"
    damping: float = 0.1
    """Share of the mean square input that is added to the diagonal of the Gram matrix."""
    refit: bool = True
    """End sparsegpt with a least-squares refit of all kept weights."""
    bias: bool = True
    """Correct biases for what pruning does to a layer's mean output."""

    @property
    def need(self) -> Need | None:
        """The moments to measure, if any."""
        if self.solver == "none":
            needs = SCORES[self.score].needs
            return "gram" if needs == "gram" else "squares" if needs == "squares" else None
        return "cross" if self.calibration == "asymmetric" else "gram"

    @property
    def calibrated(self) -> bool:
        """Whether it looks at any calibration data."""
        return self.need is not None or SCORES[self.score].needs == "gradients"


def misfit(pattern: Pattern | None, solver: Solver) -> str | None:
    """Why a solver cannot prune to a pattern, or None."""
    if solver != "sparsegpt" or isinstance(pattern, (NM, VNM, Strip)):
        return None
    if isinstance(pattern, Intersection):
        return f"{pattern}: solver sparsegpt decides group by group, and groups of both overlap; use alps or refit"
    return f"{pattern}: solver sparsegpt needs groups of columns (N:M or V:N:M); use alps or refit"


@dataclass(frozen=True)
class Solved:
    """A pruned matrix: weight (rows, cols) with zeros in place, its selection (batch 1), and what is to be reported."""

    weight: Tensor
    selection: Selection
    bias_shift: Tensor | None
    """(rows,) to add to the bias."""
    retained: float | None
    """Share of the summed score that is kept; None where the solver has no score."""
    error: float | None
    """||x W^T - x W0^T|| / ||x W0^T|| on the calibration inputs, with the pruned layers before it."""
    note: str = ""


def solve(
    weight: Tensor | Sequence[Tensor],
    pattern: Pattern,
    method: Method,
    moments: Moments | None,
    gradients: Tensor | None,
    bias: bool,
) -> Solved:
    """Prune `weight` (rows, cols) to `pattern`. `bias`: whether the layer has a bias that may change.

    Several weights of the same columns stand one below the other; they are copied together only for solvers that need
    it. Raises PatternError where a result breaks the pattern, SparsecError where the Gram matrix stays singular.
    """
    import torch

    given = Given(tuple([weight] if isinstance(weight, torch.Tensor) else weight), moments, gradients)
    bias = bias and method.bias and method.solver != "none"
    damping, note = method.damping, ""
    for _ in range(_RAISES):
        problem = None if moments is None else Problem(given, moments, damping, bias)
        try:
            found = _solved(problem, pattern, method, given)
            break
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            damping *= 10
            note = f"the Gram matrix of its inputs is singular; damping was raised to {damping:g}"
    else:
        raise SparsecError(f"the Gram matrix of its inputs stays singular with damping {damping / 10:g}")
    own = None if method.solver == "none" else found.kept  # of a solver: written to, for memory's sake
    zero = found.kept.new_zeros(())  # added, it turns -0.0 into +0.0
    kept = found.kept.add_(zero) if found.mask is None else torch.addcmul(zero, found.kept, found.mask, out=own)
    kept = kept.to(given.parts[0].dtype)
    if method.solver == "none" or problem is None:
        return Solved(kept, found.selection, None, found.retained, None, note or (problem.note if problem else ""))
    _check(kept, pattern, found)
    shift = problem.bias_shift(kept.float()) if bias else None
    return Solved(kept, found.selection, shift, found.retained, problem.error(kept.float()), note or problem.note)


def _by_score(
    weight: Tensor, problem: Problem | None, pattern: Pattern, method: Method, facts: Facts
) -> tuple[Selection, Tensor, float]:
    """Selection, mask (rows, cols; 1.0 and 0.0) and the share of the score that is kept."""
    entry = SCORES[method.score]
    if entry.needs == "gram":
        assert problem is not None
        facts = dataclasses.replace(facts, inverse=problem.inverse_diagonal)
    score = normalised(entry.function(weight, facts), method.normalise)
    total = float(score.sum())
    if not total:  # no input, or no gradient, ever: not the first columns, but the largest weights
        score = weight.abs()
        total = float(score.sum())
    selection, chosen = pattern.choose(score, method.columns)
    mask = _as_float(chosen[0])
    return selection, mask, float(score.flatten().dot(mask.flatten())) / total if total else 1.0


def _as_float(mask: Tensor) -> Tensor:
    """1.0 and 0.0; three times as fast as from bool."""
    import torch

    return mask.view(torch.uint8).float()


@dataclass(frozen=True)
class _Found:
    """What a solver gives: values where the mask (rows, cols; 1.0 and 0.0) is 1, anything elsewhere."""

    kept: Tensor
    mask: Tensor | None
    """None: values are 0 elsewhere."""
    selection: Selection
    retained: float | None = None


_Solve = Callable[[Problem | None, Pattern, Method, Given], _Found]


def _none(problem: Problem | None, pattern: Pattern, method: Method, given: Given) -> _Found:
    selection, mask, retained = _by_score(given.dense, problem, pattern, method, given.facts)
    return _Found(given.dense, mask, selection, retained)


def _refit(problem: Problem | None, pattern: Pattern, method: Method, given: Given) -> _Found:
    assert problem is not None
    selection, mask, retained = _by_score(problem.best, problem, pattern, method, given.facts)
    return _Found(refit.solve(problem.target, problem.hessian, mask, problem.best), mask, selection, retained)


def _sparsegpt(problem: Problem | None, pattern: Pattern, method: Method, given: Given) -> _Found:
    assert problem is not None
    columns = None
    if isinstance(pattern, Strip):
        columns = strip_columns(problem.best.square() / problem.inverse_diagonal, pattern.v, pattern.m, "l1")
        kept = sweep_strips(problem.best, problem.hessian, pattern, columns)
    elif isinstance(pattern, (NM, VNM)):
        kept = sweep(problem.best_parts, problem.moments.gram, problem.ridge, pattern)
    else:
        raise PatternError(str(misfit(pattern, method.solver)))
    selection, chosen = selection_of(pattern, kept, columns)
    if not method.refit:
        return _Found(kept, None, selection)
    mask = _as_float(chosen)
    return _Found(refit.solve(problem.target, problem.hessian, mask, kept), mask, selection)


def _alps(problem: Problem | None, pattern: Pattern, method: Method, given: Given) -> _Found:
    assert problem is not None
    project = Projection(pattern, "l1")  # of squares: the columns of a Euclidean projection, which ADMM asks for
    kept = alps(given.dense, problem.hessian, problem.target, project)
    selection, chosen = selection_of(pattern, kept, project.columns)
    return _Found(kept, _as_float(chosen), selection)


_SOLVE: dict[Solver, _Solve] = {"none": _none, "refit": _refit, "sparsegpt": _sparsegpt, "alps": _alps}


def _solved(problem: Problem | None, pattern: Pattern, method: Method, given: Given) -> _Found:
    """What the solver finds; for a small matrix, that of largest magnitudes with a refit where it loses less.

    Solvers are greedy. With few rows and groups they may be unlucky (1 in 100 of up to 24 x 64 weights, by up to 2x);
    with more, what they gain on average is far above it, and comparing would only cost time.
    """
    found = _SOLVE[method.solver](problem, pattern, method, given)
    if problem is None or method.solver not in ("sparsegpt", "alps") or found.kept.numel() > _SMALL:
        return found
    plain = dataclasses.replace(method, score="magnitude", normalise="none", columns="greedy")
    other = dataclasses.replace(_refit(problem, pattern, plain, given), retained=None)  # its score is not the solver's
    return min(found, other, key=lambda result: problem.lost(result.kept))


def _check(kept: Tensor, pattern: Pattern, found: _Found) -> None:
    """Whatever a solver did: its weights are finite and in the pattern (they were masked by its own selection)."""
    import torch

    if not bool(torch.isfinite(kept.sum(dtype=torch.float32))):
        raise SparsecError("the solver gave NaN or Inf; raise damping, or give more calibration data")
    broken = pattern.violations(kept[None]) if pattern.decidable else pattern.violations_of(kept[None], found.selection)
    if broken.count:
        raise PatternError(f"the solver broke {pattern} in {broken.count} places, first {broken.first[0]}")
