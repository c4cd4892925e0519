"""Sparsity patterns: what may be kept, read from and printed as text. A pattern knows no model.

One meaning everywhere: N is the number KEPT.

    2:4               keep 2 of every 4 consecutive inputs of a row
    64:2:5            V:N:M - in a block of 64 rows x 5 columns keep 4 columns, then 2 of those 4 in each row
    unstructured:0.7  keep the 30 % of largest score
    dense             keep all

Tails are padded virtually; no real weight is dropped. With t < M columns left in a row, N:M keeps min(N, t) of them,
V:N:M keeps min(4, t) columns and 2 of t in each row; with fewer than V rows left, the last strip is shorter.
Equal scores: the lowest index is kept. V:N:M is from VENOM (arXiv 2310.02065) and "Beyond 2:4" (arXiv 2410.16135).

>>> str(Pattern.parse("64:2:5")), Pattern.parse("64:2:5").words
('64:2:5', 'keep 2 of 5 (60 % zeros), V=64')
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar

from sparsec import columns as column_choice
from sparsec.columns import COLUMNS_PER_BLOCK, EXACT_MAX_M, SOLVERS, Solver
from sparsec.errors import PatternError
from sparsec.grouping import Violations, largest, offenders, pad_columns
from sparsec.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

MAX_M = 256  # an offset in the group is one byte on disk
_CHUNK_ELEMENTS = 1 << 20  # a projection works on about this many scores at once: they stay in cache
_NUMBER = "([0-9]{1,9})"
_GRAMMAR = "N:M such as 2:4, V:N:M such as 64:2:5, unstructured:0.7, or dense (N is the number kept)"


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of all patterns: `Dense`, `Unstructured`, `NM` and `VNM`."""

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern; raises PatternError with what was found and what is expected.

        >>> Pattern.parse("2:4")
        NM(n=2, m=4)
        """
        if text == "dense":
            return Dense()
        if match := re.fullmatch(r"unstructured:([0-9]*\.?[0-9]+)", text):
            return Unstructured(float(match[1]))
        if match := re.fullmatch(rf"{_NUMBER}:{_NUMBER}", text):
            return NM(int(match[1]), int(match[2]))
        if match := re.fullmatch(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}", text):
            return VNM(int(match[1]), int(match[2]), int(match[3]))
        raise PatternError(f"pattern {text!r} cannot be read; expected {_GRAMMAR}")

    @property
    @abstractmethod
    def density(self) -> float:
        """Share of weights kept where no tail is involved."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The pattern in words, echoed wherever a user could read N as the number pruned."""

    def project(self, score: Tensor, columns: Solver = "greedy") -> Selection:
        """Select the weights of largest summed score. `score`: (rows, cols) or (batch, rows, cols), finite, >= 0."""
        import torch

        score = score.detach().to(torch.float32)
        score = score[None] if score.dim() == 2 else score
        if score.dim() != 3 or not score.numel():
            raise PatternError(f"{self}: expected scores (batch, rows, cols), not empty; found {tuple(score.shape)}")
        if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            raise PatternError(f"{self}: scores must be finite and not negative; found NaN, Inf or values below 0")
        return self._project(score, columns)

    @abstractmethod
    def mask(self, selection: Selection, cols: int) -> Tensor:
        """The kept weights as (batch, rows, cols) bool."""

    @abstractmethod
    def violations(self, weight: Tensor) -> Violations:
        """Where the nonzeros of `weight`, (batch, rows, cols), break the pattern. NaN counts as nonzero."""

    @abstractmethod
    def _project(self, score: Tensor, columns: Solver) -> Selection:
        """`project` on checked scores (batch, rows, cols)."""


@dataclass(frozen=True)
class Dense(Pattern):
    """Keep every weight."""

    density: ClassVar[float] = 1.0
    words: ClassVar[str] = "keep all"

    def __str__(self) -> str:
        return "dense"

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        raise PatternError("dense keeps every weight: there is nothing to select")

    def mask(self, selection: Selection, cols: int) -> Tensor:
        raise PatternError("dense keeps every weight: there is no mask")

    def violations(self, weight: Tensor) -> Violations:
        """None: every weight is allowed."""
        return Violations(0, ())


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Keep the round((1 - sparsity) * rows * cols) weights of largest score in each matrix.

    >>> Unstructured(0.75).kept(10, 10)
    25
    """

    sparsity: float

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            raise PatternError(f"{self}: expected a share of zeros between 0 and 1, such as unstructured:0.7")

    def __str__(self) -> str:
        return f"unstructured:{Decimal(repr(self.sparsity)):f}"

    @property
    def density(self) -> float:
        return 1 - self.sparsity

    @property
    def words(self) -> str:
        return f"keep the largest {100 * self.density:.3g} % ({100 * self.sparsity:.3g} % zeros)"

    def kept(self, rows: int, cols: int) -> int:
        """Weights kept in one matrix."""
        return round(self.density * rows * cols)

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        import torch

        flat = score.flatten(1)
        keep = self.kept(*score.shape[1:])
        if not keep:
            return Selection(torch.zeros_like(score, dtype=torch.uint8))
        threshold = flat.kthvalue(flat.shape[1] - keep + 1, dim=1, keepdim=True).values
        above, equal = flat > threshold, flat == threshold
        room = keep - above.sum(1, keepdim=True)
        return Selection((above | (equal & (equal.cumsum(1) <= room))).view_as(score).to(torch.uint8))

    def mask(self, selection: Selection, cols: int) -> Tensor:
        return selection.positions.bool()

    def violations(self, weight: Tensor) -> Violations:
        nonzero = (weight != 0).sum((1, 2)).tolist()
        keep = self.kept(*weight.shape[1:])
        bad = [
            f"matrix {b}: {count} nonzeros, at most {keep} allowed" for b, count in enumerate(nonzero) if count > keep
        ]
        return Violations(len(bad), tuple(bad[:3]))


@dataclass(frozen=True)
class NM(Pattern):
    """Keep `n` of every `m` consecutive columns of each row."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise PatternError(
                f"pattern {self} would keep {self.n} of every {self.m} columns; N is the number kept, so 1 <= N <= M "
                "must hold, as in 2:4 (or V:N:M, as in 64:2:5)"
            )
        if self.m > MAX_M:
            raise PatternError(f"pattern {self}: M is {self.m}, the largest supported group is {MAX_M} columns")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    @property
    def words(self) -> str:
        return f"keep {self.n} of {self.m} ({100 - 100 * self.density:.3g} % zeros)"

    def groups(self, cols: int) -> int:
        """Groups in a row of `cols` columns, the tail included."""
        return math.ceil(cols / self.m)

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        import torch

        batch, rows, cols = score.shape
        flat = score.reshape(batch * rows, cols)
        step = max(1, _CHUNK_ELEMENTS // cols)
        kept = [largest(pad_columns(part, self.m), self.n) for part in flat.split(step)]
        return Selection(torch.cat(kept).view(batch, rows, -1, self.n))

    def mask(self, selection: Selection, cols: int) -> Tensor:
        import torch

        positions = selection.positions
        mask = torch.zeros(*positions.shape[:3], self.m, dtype=torch.bool, device=positions.device)
        return mask.scatter_(3, positions.long(), True).flatten(2)[..., :cols]

    def violations(self, weight: Tensor) -> Violations:
        counts = pad_columns((weight != 0).flatten(0, 1), self.m, fill=False).sum(2)
        return offenders(counts.view(*weight.shape[:2], -1), self.n, "row", 1)


@dataclass(frozen=True)
class VNM(Pattern):
    """Per block of `v` rows x `m` columns keep 4 columns, shared by the rows; then `n` = 2 of those 4 in each row."""

    v: int
    n: int
    m: int

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

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        import torch

        if columns not in SOLVERS:
            raise PatternError(f"unknown column solver {columns!r}; expected one of {', '.join(SOLVERS)}")
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

    def absolute_columns(self, selection: Selection, cols: int) -> Tensor:
        """Column in the weight of every slot of every row, (batch, rows, groups, 4) int64."""
        import torch

        assert selection.columns is not None
        _, rows, groups, _ = selection.positions.shape
        start = torch.arange(groups, device=selection.columns.device)[:, None] * self.m
        columns = selection.columns.long() + start
        return columns.repeat_interleave(self.v, dim=1)[:, :rows]

    def mask(self, selection: Selection, cols: int) -> Tensor:
        import torch

        batch, rows, *_ = selection.positions.shape
        kept = self.absolute_columns(selection, cols).gather(3, selection.positions.long())
        mask = torch.zeros(batch, rows, cols, dtype=torch.bool, device=kept.device)
        return mask.scatter_(2, kept.flatten(2), True)

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
