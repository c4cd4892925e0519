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
_CHUNK = 2048  # tokens multiplied at once in float32, about
_WIDE = 512  # above so many columns, the lower triangle of a Gram matrix is not computed
_BLOCKS = 8  # that it is cut into, a side


@dataclass(frozen=True)
class Moments:
    """Means over tokens of x, x x^T and x x0^T; x is (cols,), x0 the dense model's x where the two differ."""

    tokens: int
    mean: Tensor
    """(cols,) float64; 0 where only squares were asked for."""
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
        self.cols, self.need, self.tokens = cols, need, 0
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, x0: Tensor | None = None) -> None:
        """Take in (tokens, cols) inputs, and the dense model's for the same tokens where they were asked for."""
        assert self.need != "cross" or x0 is not None
        self.tokens += len(x)
        self._waiting.append((x, x0 if self.need == "cross" else None))
        if sum(len(each) for each, _ in self._waiting) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        """Multiply what has been taken in: many tokens at once, since adding up takes time too."""
        import torch

        if not self._waiting:
            return
        taken, self._waiting = self._waiting, []
        x = torch.cat([each.float() for each, _ in taken]) if len(taken) > 1 else taken[0][0].float()
        others = [other.float() for _, other in taken if other is not None]
        x0 = torch.cat(others) if others else x
        for part, part0 in zip(x.split(_CHUNK), x0.split(_CHUNK), strict=True):
            if self.need == "squares":
                self._sum("gram", torch.linalg.vector_norm(part, dim=0).square())
                continue
            self._sum("mean", part.sum(0))
            self._sum("gram", _gram(part))
            if self.need == "cross":
                self._sum("dense_mean", part0.sum(0))
                self._sum("cross", part.T @ part0)

    def _sum(self, name: str, part: Tensor) -> None:
        """Add in float64; a first part stands as it is, and is often the only one."""
        if name not in self._sums:
            self._sums[name] = part
            return
        if self._sums[name].element_size() < 8:
            self._sums[name] = self._sums[name].double()
        self._sums[name] += part

    def finish(self, where: str) -> Moments:
        """The means. Raises SparsecError naming `where` in the model if an input was not finite."""
        import torch

        self._flush()
        names = {"squares": ("gram",), "gram": ("gram", "mean"), "cross": ("gram", "mean", "cross", "dense_mean")}
        for name in names[self.need]:
            shape = (self.cols, self.cols) if name in ("gram", "cross") and self.need != "squares" else (self.cols,)
            self._sums.setdefault(name, torch.zeros(shape))
        tokens = _reduce(self.tokens, self._sums)
        if not all(bool(torch.isfinite(total.sum())) for total in self._sums.values()):
            raise SparsecError(
                f"{where}: its inputs hold NaN or Inf on the calibration data (or their squares are beyond float32); "
                "look at the layers before it, or leave it out with --ignore"
            )
        for total in self._sums.values():
            total /= max(tokens, 1)
        mean = self._sums.get("mean", torch.zeros(self.cols)).double()
        cross, dense_mean = self._sums.get("cross"), self._sums.get("dense_mean")
        return Moments(
            tokens,
            mean,
            self._sums["gram"].float(),
            None if cross is None else cross.float(),
            None if dense_mean is None else dense_mean.double(),
        )


def _gram(x: Tensor) -> Tensor:
    """x^T x, the lower blocks of a large one being the upper ones transposed."""
    cols = x.shape[1]
    if cols < _WIDE:
        return x.T @ x
    step, gram = -(-cols // _BLOCKS), x.new_empty(cols, cols)
    for start in range(0, cols, step):
        end = start + step
        gram[start:end, start:] = x[:, start:end].T @ x[:, start:]
        gram[end:, start:end] = gram[start:end, end:].T
    return gram


def _reduce(tokens: int, sums: dict[str, Tensor]) -> int:
    """Add up over the processes of torch.distributed, in float64 and in place; returns all tokens."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return tokens
    count = torch.tensor([tokens], dtype=torch.int64)
    distributed.all_reduce(count)
    for name in sorted(sums):
        sums[name] = sums[name].double()
        distributed.all_reduce(sums[name])
    return int(count)
