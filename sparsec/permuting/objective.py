"""What a pattern keeps of a matrix of scores, by groups of columns, and what it would keep with others in their place.

A matrix is seen as (strips, cols, height): V rows a strip for V:N:M, all rows in one for N:M, whose rows choose alone.
Columns are filled up with zeros to a multiple of M, and rows of V: scores are not negative, so zeros keep nothing.

1. A group of N:M keeps the N largest of its M scores in each row: exact.
2. A group of V:N:M keeps 4 columns in each strip, chosen as by `columns.choose`, and the 2 largest of them in each row.
3. One column in place of another: exact for N:M and for M <= 5. For larger M the new column may replace each of the
   best 4 of those that stay, one at a time: at most too low, so what is promised is kept.
4. One row in place of another: with the columns that its new strip keeps now, which is at most too low as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.columns import COLUMNS_PER_BLOCK, choose
from sparsec.pattern import NM, VNM, Pattern

if TYPE_CHECKING:
    from torch import Tensor

Grouped = NM | VNM
"""The patterns whose columns stand in groups: all others keep the same whatever the order of columns is."""
_CHUNK_ELEMENTS = 1 << 22  # of a table of distances, or of scores whose best are taken


def grouped(pattern: Pattern | None) -> Grouped | None:
    """The pattern that a permutation of columns helps, or None; of an intersection, the one that it is run as."""
    found = None if pattern is None else pattern.executable
    if isinstance(found, NM) and found.n < found.m:
        return found
    return found if isinstance(found, VNM) else None


@dataclass
class Grid:
    """Scores of one matrix, cut for a pattern, which are permuted in place."""

    pattern: Grouped
    cells: Tensor
    """(strips, cols, height) float32, filled up with zeros."""
    kept: Tensor
    """(strips, groups, min(4, M)) which columns of a group a strip keeps; all of them for N:M."""
    worth: Tensor
    """(strips, groups) float64: what is kept (rules 1 and 2)."""

    @staticmethod
    def of(score: Tensor, pattern: Grouped) -> Grid:
        """score: (rows, cols), finite, not negative."""
        import torch

        rows, cols = score.shape
        height = pattern.v if isinstance(pattern, VNM) else rows
        padded = torch.nn.functional.pad(score.detach().float(), (0, -cols % pattern.m, 0, -rows % height))
        cells = padded.unflatten(0, (-1, height)).transpose(1, 2).contiguous()
        shape = (cells.shape[0], cells.shape[1] // pattern.m)
        width = COLUMNS_PER_BLOCK if isinstance(pattern, VNM) else pattern.m
        grid = Grid(pattern, cells, torch.empty(*shape, width, dtype=torch.int64), torch.empty(shape).double())
        grid._settle(torch.arange(shape[0]), torch.arange(shape[1]))
        return grid

    @property
    def total(self) -> float:
        """Score kept of the whole matrix."""
        return float(self.worth.sum())

    @property
    def height(self) -> int:
        """Rows in a strip."""
        return self.cells.shape[2]

    def move(self, side: str, places: Tensor, sources: Tensor) -> None:
        """Put what stands at `sources` at `places`: `cols` or `rows`, of which padding is not to be moved."""
        import torch

        strips, groups = (torch.arange(size) for size in self.worth.shape)
        if side == "cols":
            self.cells[:, places] = self.cells[:, sources]
            self._settle(strips, (places // self.pattern.m).unique())
            return
        taken = self.cells[sources // self.height, :, sources % self.height]
        self.cells[places // self.height, :, places % self.height] = taken
        self._settle((places // self.height).unique(), groups)

    def _settle(self, strips: Tensor, groups: Tensor) -> None:
        """Choose and sum up again where cells have changed."""
        step = max(1, _CHUNK_ELEMENTS // max(1, len(groups) * self.pattern.m * self.height))
        for some in strips.split(step):
            columns = self.cells.unflatten(1, (-1, self.pattern.m))[some[:, None], groups]
            kept = self._choose(columns)
            best = largest(_pick(columns, kept), self.pattern.n, 2)
            self.kept[some[:, None], groups] = kept
            self.worth[some[:, None], groups] = best.sum((2, 3)).double()

    def _choose(self, columns: Tensor) -> Tensor:
        """(strips, n, columns, height) -> which of the columns a strip keeps, (strips, n, kept), ascending."""
        import torch

        strips, count, width, height = columns.shape
        if isinstance(self.pattern, NM) or width <= COLUMNS_PER_BLOCK:
            return torch.arange(width).expand(strips, count, -1)
        return choose(columns.transpose(2, 3).reshape(-1, height, width), "greedy").view(strips, count, -1)

    def placed(self, side: str, places: Tensor) -> Tensor:
        """What is kept, for each place (row of the table), with what stands at each of `places` (column) there instead.

        (places, places) float64, of the place's group for columns and of the row for rows, so that sums over an
        assignment differ by what it gains (rules 3 and 4). Columns must be of different groups.
        """
        return self._placed_columns(places) if side == "cols" else self._placed_rows(places)

    def _placed_columns(self, places: Tensor) -> Tensor:
        import torch

        m, n = self.pattern.m, self.pattern.n
        others = torch.arange(m - 1)
        others = (places // m * m)[:, None] + others + (others >= (places % m)[:, None])
        table = torch.zeros(len(places), len(places), dtype=torch.float64)
        for cells in self.cells.split(max(1, _CHUNK_ELEMENTS // (COLUMNS_PER_BLOCK * len(places) ** 2))):
            rest = cells[:, others.flatten()].unflatten(1, others.shape)
            table += _replaced(_pick(rest, self._choose(rest)), cells[:, places], n, isinstance(self.pattern, VNM))
        return table

    def _placed_rows(self, places: Tensor) -> Tensor:
        import torch

        rows = self.cells[places // self.height, :, places % self.height].unflatten(1, (-1, self.pattern.m))
        strips, which = (places // self.height).unique(return_inverse=True)
        step = max(1, _CHUNK_ELEMENTS // rows[0].numel())
        worth = [
            torch.cat(
                [
                    largest(part.gather(2, kept.expand(len(part), -1, -1)), self.pattern.n, 2).sum((1, 2))
                    for part in rows.split(step)
                ]
            )
            for kept in self.kept[strips]
        ]
        return torch.stack(worth)[which].double()


def _pick(columns: Tensor, kept: Tensor) -> Tensor:
    """The kept ones of (strips, n, columns, height); it is all of them where there is no choice."""
    if kept.shape[2] == columns.shape[2]:
        return columns
    return columns.gather(2, kept[..., None].expand(-1, -1, -1, columns.shape[3]))


def _replaced(rest: Tensor, new: Tensor, n: int, shared: bool) -> Tensor:
    """Score kept with a column added to others, summed over strips: (places, columns) float64.

    rest: (strips, places, others, height); new: (strips, columns, height). Where strips share 4 columns and 4 others
    are there, the new one takes the place of one, or is not kept.
    """
    import torch

    width, sets = rest.shape[2], [rest]
    found = None
    if shared and width == COLUMNS_PER_BLOCK:
        found = largest(rest, n, 2).sum((2, 3))[:, :, None].double()
        sets = [torch.cat([rest[:, :, :out], rest[:, :, out + 1 :]], 2) for out in range(width)]
    for others in sets:
        high = largest(others, n, 2)
        last = high[:, :, n - 1] if high.shape[2] == n else torch.zeros_like(high[:, :, 0])
        # The new column adds to a row what it exceeds the row's n-th best by: half of c - last + |c - last|.
        gain = torch.cdist(last, new, p=1) + (new.sum(2)[:, None] - last.sum(2)[:, :, None])
        kept = high.sum((2, 3))[:, :, None].double() + gain.double() / 2
        found = kept if found is None else torch.maximum(found, kept)
    assert found is not None
    return found.sum(0)


def largest(scores: Tensor, n: int, dim: int) -> Tensor:
    """The n largest along a dimension, in falling order; fewer where there are fewer."""
    import torch

    if n == 2 and 2 <= scores.shape[dim] <= COLUMNS_PER_BLOCK:  # minima and maxima: several times as fast as topk
        a, b, *others = scores.unbind(dim)
        high, low = torch.maximum(a, b), torch.minimum(a, b)
        for one in others:
            low = torch.maximum(low, torch.minimum(high, one))
            high = torch.maximum(high, one)
        return torch.stack([high, low], dim)
    return scores.topk(min(n, scores.shape[dim]), dim).values
