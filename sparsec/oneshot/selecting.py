"""From masks to selections, and projections that a solver asks for again and again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec import columns as column_choice
from sparsec.columns import COLUMNS_PER_BLOCK, EXACT_MAX_M, Solver
from sparsec.errors import PatternError
from sparsec.grouping import MOST_COMPARED, kept_of
from sparsec.pattern import NM, VNM, Pattern, Strip
from sparsec.selection import Selection
from sparsec.strips import strip_columns

if TYPE_CHECKING:
    from torch import Tensor

_REGROUPED = (5, 10, 20)  # steps of a solver at which strips choose their columns anew; the search is slow


def selection_of(pattern: Pattern, kept: Tensor, columns: Tensor | None = None) -> tuple[Selection, Tensor]:
    """Selection and mask (rows, cols) of a pruned weight (rows, cols): what is not 0, filled up to what may be kept.

    `columns`: of a strip pattern, (strips, groups, 4), see `Strip.select`.
    """
    size = kept.abs()[None]
    if columns is not None and isinstance(pattern, Strip):
        selection = pattern.select(size, columns[None])
        return selection, pattern.mask(selection, kept.shape[1])[0]
    # A column that no row keeps has no sum, so the four of largest sum are the right ones.
    selection, mask = pattern.choose(size, "l1")
    return selection, mask[0]


class Projection:
    """The mask of the pattern's largest scores, for a solver that asks again and again; all is (cols, rows).

    Transposed, so that a column's scores lie side by side: N:M and V:N:M windows are then projected several times
    faster than `Pattern.project` does, to the same masks.
    """

    def __init__(self, pattern: Pattern, solver: Solver) -> None:
        if isinstance(pattern, VNM) and solver == "exact" and pattern.m > EXACT_MAX_M:
            raise PatternError(f"{pattern}: the exact column solver is limited to M <= {EXACT_MAX_M}; use greedy")
        self.pattern, self.solver = pattern, solver
        self.columns: Tensor | None = None
        """Of strips, those of the last call."""
        self._calls = 0

    def __call__(self, score: Tensor) -> Tensor:
        pattern = self.pattern
        if isinstance(pattern, Strip):
            return self._strips(pattern, score.T).T
        if isinstance(pattern, (NM, VNM)):
            return self._groups(pattern, score)
        return pattern.choose(score.T, self.solver)[1][0].T

    def _strips(self, pattern: Strip, score: Tensor) -> Tensor:
        if self.columns is None or self._calls in _REGROUPED:
            self.columns = strip_columns(score, pattern.v, pattern.m, self.solver, rounds=1)
        self._calls += 1
        return pattern.mask(pattern.select(score[None], self.columns[None]), score.shape[1])[0]

    def _groups(self, pattern: NM | VNM, score: Tensor) -> Tensor:
        import torch

        cols = len(score)
        whole = cols // pattern.m * pattern.m
        parts = []
        for part, m in ((score[:whole], pattern.m), (score[whole:], cols - whole)):
            if len(part):
                grouped = part.unflatten(0, (-1, m))
                shared = isinstance(pattern, VNM) and m > COLUMNS_PER_BLOCK
                parts.append((self._blocks(pattern, grouped) if shared else _top(grouped, pattern.n)).flatten(0, 1))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _blocks(self, pattern: NM | VNM, grouped: Tensor) -> Tensor:
        """V:N:M. `grouped`: (groups, m, rows)."""
        import torch

        assert isinstance(pattern, VNM)
        groups, _, rows = grouped.shape
        padded = torch.nn.functional.pad(grouped, (0, -rows % pattern.v))
        blocks = padded.unflatten(2, (-1, pattern.v)).permute(0, 2, 1, 3).flatten(0, 1)  # (blocks, m, V)
        columns = column_choice.choose(blocks.transpose(1, 2), self.solver)
        places = columns[:, :, None].expand(-1, -1, pattern.v)
        kept = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, places, _top(blocks.gather(1, places), pattern.n))
        mask: Tensor = kept.unflatten(0, (groups, -1)).permute(0, 2, 1, 3).flatten(2)[:, :, :rows]
        return mask


def _top(grouped: Tensor, n: int) -> Tensor:
    """Where the `n` largest of axis 1 are, (groups, m, ...); the lowest index wins ties."""
    import torch

    m = grouped.shape[1]
    if m <= n:
        return torch.ones_like(grouped, dtype=torch.bool)
    if m > MOST_COMPARED:
        order = grouped.argsort(dim=1, descending=True, stable=True)[:, :n]
        return torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, order, True)
    kept: Tensor = kept_of(grouped.transpose(0, 1), n).transpose(0, 1)
    return kept
