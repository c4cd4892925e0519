"""Patterns whose rows share columns: V:N:M, which takes them from windows of M columns, and strips, from anywhere."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from sparsec import columns as column_choice
from sparsec.columns import COLUMNS_PER_BLOCK, EXACT_MAX_M, SOLVERS, Solver
from sparsec.errors import PatternError
from sparsec.grouping import Violations, largest, most_in, offenders, pad_columns
from sparsec.pattern_base import MAX_M, Pattern
from sparsec.selection import Selection, as_stored, in_place
from sparsec.strips import canonical, real_in_last, strip_columns

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20  # a projection works on about this many scores at once: they stay in cache


@dataclass(frozen=True)
class SharedColumns(Pattern):
    """`v` rows share groups of 4 columns, one group for every `m` columns; each row keeps `n` = 2 of every four."""

    v: int
    n: int
    m: int

    index: ClassVar[Literal["window", "strip"]]
    """Where the columns come from."""

    def __post_init__(self) -> None:
        if self.n != 2:
            raise PatternError(
                f"pattern {self}: V:N:M is defined for N = 2 (2 of 4 shared columns); try {self.v}:2:{self.m}"
            )
        if self.v < 1 or not COLUMNS_PER_BLOCK <= self.m <= MAX_M:
            raise PatternError(f"pattern {self}: expected V >= 1 and 4 <= M <= {MAX_M}, such as 64:2:5")

    def __str__(self) -> str:
        return f"{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def words(self) -> str:
        return f"keep {self.n} of {self.m} ({100 - 100 * self.density:.3g} % zeros), V={self.v}"

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns, the tail included."""
        return math.ceil(cols / self.m)

    def strips(self, rows: int) -> int:
        """Strips of V rows, the shorter last one included."""
        return math.ceil(rows / self.v)

    @abstractmethod
    def real_slots(self, cols: int) -> int:
        """How many of the last group's 4 slots have a column of their own: 4, or fewer where it is a tail."""

    @abstractmethod
    def absolute_columns(self, selection: Selection, cols: int) -> Tensor:
        """Column in the weight of every slot of every row of the tables, (batch, rows, groups, 4) int64."""

    def mask(self, selection: Selection, cols: int) -> Tensor:
        import torch

        batch, rows, *_ = selection.positions.shape
        kept = self.absolute_columns(selection, cols).gather(3, selection.positions.long())
        mask = torch.zeros(batch, rows, cols, dtype=torch.bool, device=kept.device)
        return in_place(mask.scatter_(2, kept.flatten(2), True), selection.rows)

    def _check_solver(self, solver: Solver) -> None:
        if solver not in SOLVERS:
            raise PatternError(f"unknown column solver {solver!r}; expected one of {', '.join(SOLVERS)}")


@dataclass(frozen=True)
class VNM(SharedColumns):
    """Per block of `v` rows x `m` columns keep 4 columns, shared by the rows; then `n` = 2 of those 4 in each row."""

    index: ClassVar[Literal["window", "strip"]] = "window"

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        import torch

        self._check_solver(columns)
        if columns == "exact" and self.m > EXACT_MAX_M:
            raise PatternError(f"{self}: the exact column solver is limited to M <= {EXACT_MAX_M}; use greedy")
        chosen, positions = [], []
        for matrix in score:
            # Strips are taken a few at a time, so that the solver's copies of the scores stay small.
            step = self.v * max(1, _CHUNK_ELEMENTS // (self.v * matrix.shape[1]))
            parts = [self._project_strips(part, columns) for part in matrix.split(step)]
            chosen.append(torch.cat([part[0] for part in parts]))
            positions.append(torch.cat([part[1] for part in parts]))
        return Selection(torch.stack(positions), torch.stack(chosen))

    def _project_strips(self, score: Tensor, solver: Solver) -> tuple[Tensor, Tensor]:
        """Columns (strips, groups, 4) and positions (rows, groups, 2) of a few strips of one matrix."""
        import torch

        rows, cols = score.shape
        groups, strips = self.groups(cols), self.strips(rows)
        blocks = pad_columns(score, self.m)  # (rows, groups, m), padding at -1
        missing = strips * self.v - rows
        padded = torch.cat([blocks, blocks[:1].clamp(max=0).expand(missing, -1, -1)]) if missing else blocks
        by_block = padded.view(strips, self.v, groups, self.m).transpose(1, 2)
        columns = column_choice.choose(by_block.reshape(-1, self.v, self.m), solver).view(strips, groups, -1)
        per_row = columns.repeat_interleave(self.v, dim=0)[:rows]
        positions = largest(blocks.gather(2, per_row), self.n)
        tail = cols - (groups - 1) * self.m
        columns[:, -1].clamp_(max=tail - 1)  # padding slots stand for the last real column
        return columns.to(torch.uint8), positions

    def most_in(self, window: int) -> int:
        return most_in(self.n, self.m, window)

    def _follows_from(self, other: Pattern) -> bool:
        """2 of M in each row, and no more than 4 columns a block: of 4 there are, of 2 rows, or of a larger block."""
        few = self.m == COLUMNS_PER_BLOCK or self.v * self.n <= COLUMNS_PER_BLOCK
        inside = isinstance(other, VNM) and other.m % self.m == 0 and other.v % self.v == 0
        return (few or inside) and other.most_in(self.m) <= self.n

    def real_slots(self, cols: int) -> int:
        return min(COLUMNS_PER_BLOCK, cols - (self.groups(cols) - 1) * self.m)

    def absolute_columns(self, selection: Selection, cols: int) -> Tensor:
        import torch

        assert selection.columns is not None
        _, rows, groups, _ = selection.positions.shape
        start = torch.arange(groups, device=selection.columns.device)[:, None] * self.m
        columns = selection.columns.long() + start
        return columns.repeat_interleave(self.v, dim=1)[:, :rows]

    def violations(self, weight: Tensor) -> Violations:
        import torch

        batch, rows, _ = weight.shape
        nonzero = pad_columns((weight != 0).flatten(0, 1), self.m, fill=False)
        nonzero = nonzero.view(batch, rows, -1, self.m)
        by_row = offenders(nonzero.sum(3), self.n, "row", 1)
        missing = self.strips(rows) * self.v - rows
        strips = torch.nn.functional.pad(nonzero, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, self.v)).any(2)
        by_strip = offenders(strips.sum(3), COLUMNS_PER_BLOCK, "rows from", self.v)
        return Violations(by_row.count + by_strip.count, (by_row.first + by_strip.first)[:3])


@dataclass(frozen=True)
class Strip(SharedColumns):
    """Per strip of `v` rows keep 4 * ceil(cols / `m`) columns from anywhere; in each row 2 of every four of them.

    A strip is `v` rows below each other, or any `v` rows, which a table then names (`Selection.rows`).

    Weights alone cannot disprove that they follow it: all groupings would have to be tried. So `violations` tests what
    must hold for any grouping, and `violations_of` what must hold for the stored one. A projected score shows its
    grouping where V is 32 or more, and is projected to itself. With fewer rows, or rows whose kept weights are partly
    0, another grouping may be found that keeps a little less; `select` with the old columns keeps everything.
    """

    index: ClassVar[Literal["window", "strip"]] = "strip"
    decidable: ClassVar[bool] = False

    ROWS: ClassVar[int] = 16
    """Of a strip that kernels take at once: they run a strip pattern whose V is a multiple."""

    def __str__(self) -> str:
        return f"{super().__str__()}@strip"

    @property
    def words(self) -> str:
        return f"{super().words}, columns from anywhere in the strip"

    def real_slots(self, cols: int) -> int:
        return real_in_last(cols, self.m)

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        """Columns by `strips.strip_columns`; `greedy` and `exact` are one search here."""
        import torch

        self._check_solver(columns)
        return self.select(score, torch.stack([strip_columns(one, self.v, self.m, columns) for one in score]))

    def select(self, score: Tensor, columns: Tensor, rows: Tensor | None = None) -> Selection:
        """Keep the 2 largest scores of every four columns.

        score: (batch, rows, cols); columns: (batch, strips, groups, 4), see `strips.canonical`, which is applied. rows:
        (batch, rows) of integers, which rows make up a strip, V by V; brought into the order of `Selection.rows`.
        """
        import torch

        cols = score.shape[2]
        if rows is not None:
            rows = torch.cat([strip.sort(1).values for strip in rows.split(self.v, 1)], 1).to(torch.int32)
        score = as_stored(score, rows)
        columns = canonical(columns, cols).to(score.device)
        by_row = columns.repeat_interleave(self.v, dim=1)[:, : score.shape[1]]
        found = score.gather(2, by_row.flatten(2)).view(by_row.shape)
        found[:, :, -1, self.real_slots(cols) :] = -1  # a spare slot loses against every real column
        positions = largest(found.flatten(0, 1), self.n).view(*found.shape[:3], self.n)
        return Selection(positions, columns.to(torch.int32), rows=rows)

    def absolute_columns(self, selection: Selection, cols: int) -> Tensor:
        assert selection.columns is not None
        return selection.columns.long().repeat_interleave(self.v, dim=1)[:, : selection.positions.shape[1]]

    def violations(self, weight: Tensor) -> Violations:
        """Rows with more nonzeros, and strips with more nonzero columns, than any choice of columns allows.

        Strips of neighbouring rows; where rows moved, `row_violations` holds, and `violations_of` knows the strips.
        """
        import torch

        _, rows, cols = weight.shape
        nonzero, groups, by_row = weight != 0, self.groups(cols), self.row_violations(weight)
        padded = torch.nn.functional.pad(nonzero, (0, 0, 0, self.strips(rows) * self.v - rows))
        columns = padded.unflatten(1, (-1, self.v)).any(2).sum(2)
        by_strip = offenders(columns, COLUMNS_PER_BLOCK * groups, "rows from", self.v)
        return Violations(by_row.count + by_strip.count, (by_row.first + by_strip.first)[:3])

    def row_violations(self, weight: Tensor) -> Violations:
        """Rows with more nonzeros than any choice of columns and rows allows."""
        cols = weight.shape[2]
        most = self.n * (self.groups(cols) - 1) + min(self.n, self.real_slots(cols))
        return offenders((weight != 0).sum(2), most, "row", 1)

    def violations_of(self, weight: Tensor, selection: Selection) -> Violations:
        """Columns of `selection` that are in two groups of a strip; where there are none, as for every pattern."""
        twice = self.shared_twice(selection, weight.shape[2]).nonzero()
        if not len(twice) and selection.rows is None:
            return super().violations_of(weight, selection)
        if not len(twice):  # the rows of a strip become neighbours
            found = super().violations_of(as_stored(weight, selection.rows), replace(selection, rows=None))
            return Violations(found.count, tuple(f"in the order of its row table: {text}" for text in found.first))
        first = tuple(
            f"rows from {s * self.v}{f' of matrix {b}' if weight.shape[0] > 1 else ''}: column {c} is in two groups"
            for b, s, c in twice[:3].tolist()
        )
        return Violations(len(twice), first)

    def shared_twice(self, selection: Selection, cols: int) -> Tensor:
        """(batch, strips, cols) bool: the columns that are in more than one group of a strip."""
        import torch

        assert selection.columns is not None
        columns = selection.columns.long()
        batch, strips, _, _ = columns.shape
        own = torch.ones_like(columns)
        own[:, :, -1, self.real_slots(cols) :] = 0  # spare slots repeat a column of their group
        counts = torch.zeros(batch, strips, cols, dtype=torch.int64, device=columns.device)
        return counts.scatter_add_(2, columns.flatten(2), own.flatten(2)) > 1


def violations_alone(pattern: Pattern, weight: Tensor, moved: bool) -> Violations:
    """What a weight (batch, rows, cols) shows without tables; `moved`: its strips are not of neighbouring rows."""
    return pattern.row_violations(weight) if moved and isinstance(pattern, Strip) else pattern.violations(weight)
