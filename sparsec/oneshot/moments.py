"""Second moments of a layer's inputs: what every solver and most scores know of the calibration data.

Sums over batches, and over processes of torch.distributed, are in float64: another split of the same batches gives the
same moments up to 1e-16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsec.errors import SparsecError

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["squares", "gram", "cross"]
"""The squares of each input only; all products of two; and those with the dense model's inputs besides."""
_CHUNK = 4096  # tokens multiplied at once in float32
_HALVES = 512  # above so many columns, the lower triangle of a Gram matrix is not computed block by block


@dataclass(frozen=True)
class Moments:
    """Means over tokens of x, x x^T and x x0^T; x is (cols,), x0 the dense model's x where the two differ."""

    tokens: int
    mean: Tensor
    """(cols,) float64."""
    gram: Tensor
    """(cols, cols) float32, or (cols,) where only squares were asked for."""
    cross: Tensor | None = None
    """(cols, cols) float32: x by rows, x0 by columns; None where x0 is x."""
    dense_mean: Tensor | None = None

    @property
    def squares(self) -> Tensor:
        """Mean square of every input, (cols,)."""
        return self.gram.diagonal() if self.gram.dim() == 2 else self.gram

    def centred(self) -> Moments:
        """The moments about the means: what is left to explain once a bias is free."""
        mean = self.mean.float()
        other = mean if self.dense_mean is None else self.dense_mean.float()
        gram = self.gram - mean.outer(mean)
        cross = None if self.cross is None else self.cross - mean.outer(other)
        return Moments(self.tokens, self.mean, gram, cross, self.dense_mean)


class Collector:
    """Adds up moments over batches, and in `finish` over the processes of torch.distributed."""

    def __init__(self, cols: int, need: Need) -> None:
        import torch

        self.need, self.tokens = need, 0
        self._mean = torch.zeros(cols, dtype=torch.float64)
        self._gram = torch.zeros((cols,) if need == "squares" else (cols, cols), dtype=torch.float64)
        self._cross = torch.zeros_like(self._gram) if need == "cross" else None
        self._dense_mean = torch.zeros_like(self._mean) if need == "cross" else None

    def add(self, x: Tensor, x0: Tensor | None = None) -> None:
        """Take in (tokens, cols) inputs, and the dense model's for the same tokens where they were asked for."""
        import torch

        x = x.float()
        self.tokens += len(x)
        self._mean += x.sum(0, dtype=torch.float64)
        if self.need == "squares":
            self._gram += x.square().sum(0, dtype=torch.float64)
            return
        for part in x.split(_CHUNK):
            _add_gram(self._gram, part)
        if self._cross is not None and self._dense_mean is not None:
            assert x0 is not None
            x0 = x0.float()
            self._dense_mean += x0.sum(0, dtype=torch.float64)
            for part, part0 in zip(x.split(_CHUNK), x0.split(_CHUNK), strict=True):
                self._cross += part.T @ part0

    def finish(self, where: str) -> Moments:
        """The means. Raises SparsecError naming `where` in the model if an input was not finite."""
        import torch

        sums = [total for total in (self._gram, self._mean, self._cross, self._dense_mean) if total is not None]
        tokens = _reduce(self.tokens, sums)
        if not all(bool(torch.isfinite(total.sum())) for total in sums):
            raise SparsecError(
                f"{where}: its inputs hold NaN or Inf on the calibration data (or their squares are beyond float32); "
                "look at the layers before it, or leave it out with --ignore"
            )
        for total in sums:
            total /= max(tokens, 1)
        cross = None if self._cross is None else self._cross.float()
        return Moments(tokens, self._mean, self._gram.float(), cross, self._dense_mean)


def _add_gram(gram: Tensor, x: Tensor) -> None:
    """gram += x^T x, whose lower blocks are the upper ones transposed."""
    cols = x.shape[1]
    half = cols // 2 if cols >= _HALVES else cols
    left, right = x[:, :half], x[:, half:]
    gram[:half, :half] += left.T @ left
    if half < cols:
        corner = left.T @ right
        gram[:half, half:] += corner
        gram[half:, :half] += corner.T
        gram[half:, half:] += right.T @ right


def _reduce(tokens: int, sums: list[Tensor]) -> int:
    """Add up over the processes of torch.distributed, in place; returns all tokens."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return tokens
    count = torch.tensor([tokens], dtype=torch.int64)
    for total in (count, *sums):
        distributed.all_reduce(total)
    return int(count)
