"""Importance scores: what each weight is worth, (rows, cols), never negative. A pattern keeps the largest sums.

To add one: a function here and its line in SCORES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.oneshot.moments import Moments

Score = Literal["magnitude", "wanda", "ria", "obs", "taylor", "fisher", "seven"]
NAMES: tuple[Score, ...] = get_args(Score)
Normalise = Literal["none", "row", "rank"]
"""What is done to each row's scores before V rows are summed: nothing, divide by the row's mean, take their ranks."""
_RIA_POWER = 0.5


@dataclass(frozen=True)
class Facts:
    """What a score may look at besides the weight it is asked about."""

    weight: Tensor
    """The dense weight, (rows, cols)."""
    moments: Moments | None = None
    gradients: Tensor | None = None
    """What `gradients` gathered for this score, (rows, cols)."""
    inverse: Tensor | None = None
    """Diagonal of the damped Gram matrix's inverse, (cols,)."""


@dataclass(frozen=True)
class _Entry:
    describes: str
    function: Callable[[Tensor, Facts], Tensor]
    needs: Literal["nothing", "squares", "gram", "gradients"]


def _magnitude(weight: Tensor, facts: Facts) -> Tensor:
    return weight.abs()


def _wanda(weight: Tensor, facts: Facts) -> Tensor:
    assert facts.moments is not None
    return weight.abs() * facts.moments.squares.clamp(min=0).sqrt()


def _ria(weight: Tensor, facts: Facts) -> Tensor:
    assert facts.moments is not None
    size = weight.abs()
    relative = size / size.sum(0).clamp(min=1e-30) + size / size.sum(1, keepdim=True).clamp(min=1e-30)
    norms = (facts.moments.squares.clamp(min=0) * facts.moments.tokens).sqrt()
    return relative * norms**_RIA_POWER


def _obs(weight: Tensor, facts: Facts) -> Tensor:
    assert facts.inverse is not None
    return weight.square() / facts.inverse


def _gathered(weight: Tensor, facts: Facts) -> Tensor:
    assert facts.gradients is not None
    return facts.gradients


SCORES: dict[Score, _Entry] = {
    "magnitude": _Entry("|w|", _magnitude, "nothing"),
    "wanda": _Entry("|w| times the norm of its input (arXiv 2306.11695)", _wanda, "squares"),
    "ria": _Entry("|w| relative to its row and column, times the input's norm^0.5 (ICLR 2024)", _ria, "squares"),
    "obs": _Entry("what dropping a weight costs when the others adapt (Optimal Brain Surgeon)", _obs, "gram"),
    "taylor": _Entry("|w g|, the first-order change of the loss (arXiv 1906.10771)", _gathered, "gradients"),
    "fisher": _Entry("OBS on the Fisher block of each group of M (VENOM, arXiv 2310.02065)", _gathered, "gradients"),
    "seven": _Entry("|w g| weighted by how steady the gradient is (SEVEN_pre)", _gathered, "gradients"),
}


def normalised(score: Tensor, how: Normalise) -> Tensor:
    """Scores of (..., rows, cols) made comparable between rows: one of large scores then picks no columns alone."""
    if how == "row":
        return score / score.mean(-1, keepdim=True).clamp(min=1e-30)
    if how == "rank":
        places = score.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
        return places.to(score.dtype) / score.shape[-1]
    return score
