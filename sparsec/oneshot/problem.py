"""What a solver is asked: a layer's weights, what is known of its inputs, and the least squares that they make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sparsec.oneshot.moments import ROUNDING, Moments
from sparsec.oneshot.scores import Facts

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # of a layer whose error is computed: all rows would cost as much as a sweep
_AT_ONCE = 256  # rows of a matrix that are held in float64


@dataclass(frozen=True)
class Given:
    """What a solver is given of a layer: weights of any float type, one below the other, and what is known of them."""

    parts: tuple[Tensor, ...]
    moments: Moments | None
    gradients: Tensor | None

    @cached_property
    def floats(self) -> tuple[Tensor, ...]:
        return tuple(part.float() for part in self.parts)

    @cached_property
    def dense(self) -> Tensor:
        """(rows, cols) float32; of several weights, a copy."""
        import torch

        return torch.cat(self.floats) if len(self.parts) > 1 else self.floats[0]

    @cached_property
    def facts(self) -> Facts:
        return Facts(self.dense, self.moments, self.gradients)

    def rows(self, which: Tensor) -> Tensor:
        """Some rows of all, by ascending indices; no more than these are copied."""
        import torch

        found, first = [], 0
        for part in self.floats:
            inside = which[(which >= first) & (which < first + len(part))] - first
            found.append(part.index_select(0, inside))
            first += len(part)
        return torch.cat(found)


class Problem:
    """minimise tr((W - Q) H (W - Q)^T): W the weight that is best when nothing is pruned, H the damped Gram matrix."""

    def __init__(self, given: Given, moments: Moments, damping: float, bias: bool) -> None:
        self.given = given
        self.moments = moments.centred(ROUNDING) if bias and moments.gram.dim() == 2 else moments
        level = float(self.moments.squares.mean())
        self.note = ""
        if not level > 0:
            self.note, level = "its inputs are always 0, so weights were chosen by magnitude", 1.0
        self.ridge = damping * level

    @cached_property
    def hessian(self) -> Tensor:
        return _plus_ridge(self.moments.gram, self.ridge)

    @cached_property
    def target(self) -> Tensor:
        """W H."""
        cross = self.moments.cross
        return self.given.dense @ (self.hessian if cross is None else _plus_ridge(cross.T, self.ridge))

    @cached_property
    def best(self) -> Tensor:
        """W."""
        import torch

        if self.moments.cross is None:
            return self.given.dense
        return torch.cholesky_solve(self.target.T, self._factor).T

    @property
    def best_parts(self) -> tuple[Tensor, ...]:
        """W in parts, without a copy where the dense weight is best."""
        return self.given.floats if self.moments.cross is None else (self.best,)

    @cached_property
    def inverse_diagonal(self) -> Tensor:
        """Of H^-1, (cols,)."""
        import torch

        return torch.cholesky_inverse(self._factor).diagonal().clamp(min=1e-30)

    @cached_property
    def _factor(self) -> Tensor:
        import torch

        factor: Tensor = torch.linalg.cholesky(self.hessian)
        return factor

    def lost(self, kept: Tensor) -> float:
        """What is minimised, less what all Q have in common."""
        wide = kept.double()
        return float(((wide @ self.hessian.double() - 2 * self.target.double()) * wide).sum())

    def bias_shift(self, kept: Tensor) -> Tensor:
        before = self.moments.mean if self.moments.dense_mean is None else self.moments.dense_mean
        return (_applied(self.given.floats, before) - _applied([kept], self.moments.mean)).float()

    def error(self, kept: Tensor) -> float:
        """Of the outputs, relative: exact for up to _ROWS rows, else of so many evenly spread ones.

        |x Q - x W|, also where |x Q - x0 W| is minimised: |x0 W| would need one more Gram matrix.
        """
        import torch

        rows = torch.linspace(0, len(kept) - 1, min(_ROWS, len(kept)), device=kept.device).long()
        dense = self.given.rows(rows)
        energy, lost = (float(((part @ self.moments.gram) * part).sum()) for part in (dense, kept[rows] - dense))
        return math.sqrt(max(lost, 0.0) / max(energy, 1e-30))


def _applied(parts: Sequence[Tensor], vector: Tensor) -> Tensor:
    """Matrices one below the other times a float64 vector, in float64, some rows at a time."""
    import torch

    return torch.cat([some.double() @ vector for part in parts for some in part.split(_AT_ONCE)])


def _plus_ridge(matrix: Tensor, ridge: float) -> Tensor:
    damped = matrix.clone()
    damped.diagonal().add_(ridge)
    return damped
