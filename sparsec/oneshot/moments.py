"""Second moments of a layer's inputs: what every solver and most scores know of the calibration data.

Sums over processes of torch.distributed are in float64, those of matrices over batches in float32, in two levels: after
a million tokens the error of an element is about 1e-6 of it, far below what damping adds to the diagonal. Where there
are tile units, products are computed by them (`gram.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsec.errors import SparsecError
from sparsec.oneshot import gram

if TYPE_CHECKING:
    from torch import Tensor

Need = Literal["squares", "gram", "cross"]
"""The squares of each input only; all products of two; and those with the dense model's inputs besides."""
ROUNDING = 3e-5
"""Of a mean square, relative: what `gram.py` proves; without tile units it is far less."""
_AT_ONCE = 512  # tokens of a product, about: small batches are put together
_SINGLE = 2048  # tokens whose products are one term of the sums: few terms, little rounding
_STRIP = 64  # rows of a Gram matrix that are computed together, from the diagonal on


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

    def centred(self, least: float = 0.0) -> Moments:
        """The moments about the means: what is left to explain once a bias is free.

        No variance is less than `least` of the mean square. Of inputs that hardly vary, rounding leaves any number.
        """
        mean = self.mean.float()
        other = mean if self.dense_mean is None else self.dense_mean.float()
        gram = self.gram - mean.outer(mean)
        gram.diagonal().copy_(gram.diagonal().maximum(least * self.squares))
        cross = None if self.cross is None else self.cross - mean.outer(other)
        return Moments(self.tokens, self.mean, gram, cross, self.dense_mean)


class Collector:
    """Adds up moments over batches, and in `finish` over the processes of torch.distributed.

    Products of `_SINGLE` tokens are added up, then those sums. Of a Gram matrix only the upper triangle is computed and
    held (`_strips`); `finish` mirrors it.
    """

    def __init__(self, cols: int, need: Need) -> None:
        self.cols, self.need, self.tokens = cols, need, 0
        self._waiting: list[tuple[Tensor, Tensor | None]] = []
        self._single = 0  # tokens in self._products
        self._products: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}

    def add(self, x: Tensor, x0: Tensor | None = None) -> None:
        """Take in (tokens, cols) inputs, and the dense model's for the same tokens where they were asked for."""
        assert self.need != "cross" or x0 is not None
        self.tokens += len(x)
        self._waiting.append((x, x0 if self.need == "cross" else None))
        if sum(len(each) for each, _ in self._waiting) >= _AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        """Multiply what has been taken in."""
        import torch

        if not self._waiting:
            return
        taken, self._waiting = self._waiting, []
        x = torch.cat([each.float() for each, _ in taken]) if len(taken) > 1 else taken[0][0].float()
        others = [other.float() for _, other in taken if other is not None]
        x0 = x if not others else torch.cat(others) if len(others) > 1 else others[0]
        for part, part0 in zip(x.split(_AT_ONCE), x0.split(_AT_ONCE), strict=True):
            if self.need == "squares":
                self._sum("gram", part.square().sum(0))  # a fourth of the time of vector_norm
                continue
            self._sum("mean", part.sum(0))
            self._multiply("gram", part, part, _STRIP)
            if self.need == "cross":
                self._sum("dense_mean", part0.sum(0))
                self._multiply("cross", part, part0, self.cols)
            self._single += len(part)
            if self._single >= _SINGLE:
                self._fold()

    def _multiply(self, name: str, x: Tensor, x0: Tensor, rows: int) -> None:
        """Add x^T x0 in place, `rows` of it at a time and each from the diagonal on."""
        import torch

        first = name not in self._products
        if first:
            self._products[name] = x.new_empty(_nelement(self.cols, rows))
        if gram.available(x, x0):
            gram.add(x, x0, self._products[name], rows, first)
            return
        for i, strip in _strips(self._products[name], self.cols, rows):
            torch.addmm(strip, x[:, i : i + rows].T, x0[:, i:], beta=0 if first else 1, out=strip)

    def _fold(self) -> None:
        """Add the products to the sums; a first one stands as it is, and is often the only one."""
        self._single, products = 0, self._products
        self._products = {}
        for name, found in products.items():
            if name in self._sums:
                self._sums[name] += found
            else:
                self._sums[name] = found

    def _sum(self, name: str, part: Tensor) -> None:
        """Add vectors, in float64."""
        self._sums[name] = self._sums[name] + part if name in self._sums else part.double()

    def finish(self, where: str) -> Moments:
        """The means. Raises SparsecError naming `where` in the model if an input was not finite."""
        import torch

        self._flush()
        self._fold()
        names = {"squares": ("gram",), "gram": ("gram", "mean"), "cross": ("gram", "mean", "cross", "dense_mean")}
        rows = {"gram": _STRIP, "cross": self.cols} if self.need != "squares" else {}
        for name in names[self.need]:
            self._sums.setdefault(name, torch.zeros(_nelement(self.cols, rows[name]) if name in rows else self.cols))
        tokens = _reduce(self.tokens, self._sums)
        if not all(bool(torch.isfinite(total.sum())) for total in self._sums.values()):
            raise SparsecError(
                f"{where}: its inputs hold NaN or Inf on the calibration data (or their squares are beyond float32); "
                "look at the layers before it, or leave it out with --ignore"
            )
        for total in self._sums.values():
            total /= max(tokens, 1)
        mean = self._sums.get("mean", torch.zeros(self.cols)).double()
        matrices = {
            name: _unpacked(self._sums.pop(name), self.cols, height)
            for name, height in rows.items()
            if name in self._sums
        }
        dense_mean = self._sums.get("dense_mean")
        return Moments(
            tokens,
            mean,
            _mirror(matrices["gram"]) if matrices else self._sums["gram"].float(),
            matrices.get("cross"),
            None if dense_mean is None else dense_mean.double(),
        )


def nbytes(cols: int, need: Need | None) -> int:
    """Bytes that the moments of so many inputs take at most, while they are measured."""
    matrices = {"gram": 1.5, "cross": 3.5}.get(need or "", 0.0)  # triangles of sums and products, later whole
    return int(matrices * cols * cols) * 4


def _nelement(cols: int, rows: int) -> int:
    """Elements of a matrix that is held as strips of `rows`, each from the diagonal on, one after the other."""
    return sum(min(rows, cols - i) * (cols - i) for i in range(0, cols, rows))


def _strips(held: Tensor, cols: int, rows: int) -> Iterator[tuple[int, Tensor]]:
    """The strips, as views, and where each begins."""
    start = 0
    for i in range(0, cols, rows):
        height, width = min(rows, cols - i), cols - i
        yield i, held[start : start + height * width].view(height, width)
        start += height * width


def _unpacked(held: Tensor, cols: int, rows: int) -> Tensor:
    """The matrix (cols, cols) float32; what lies below the strips is anything."""
    import torch

    found = held.new_empty(cols, cols, dtype=torch.float32)
    for i, strip in _strips(held, cols, rows):
        found[i : i + rows, i:] = strip
    return found


def _mirror(gram: Tensor) -> Tensor:
    """Make what stands below the diagonal that above it, in place."""
    for i in range(0, len(gram), _STRIP):
        own, end = gram[i : i + _STRIP, i : i + _STRIP], i + _STRIP
        own.copy_(own.triu() + own.triu(1).T)
        gram[end:, i:end] = gram[i:end, end:].T
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
