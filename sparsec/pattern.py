"""Sparsity patterns: what may be kept, read from and printed as text. A pattern knows no model.

One meaning everywhere: N is the number KEPT.

    2:4               keep 2 of every 4 consecutive inputs of a row
    64:2:5            V:N:M - in a block of 64 rows x 5 columns keep 4 columns, then 2 of those 4 in each row
    64:2:5@strip      in a strip of 64 rows keep 4 * ceil(C / 5) of all C columns, in groups of any four; then 2 of each
                      four in each row. What V:N:M keeps after any permutation of the columns, and more
    64:2:5+2:4        both at once: run as the first, N:M or V:N:M, with fewer kept so that the second, N:M, holds too
    unstructured:0.7  keep the 30 % of largest score
    dense             keep all

Tails are padded virtually; no real weight is dropped. With t < M columns left in a row, N:M keeps min(N, t) of them,
V:N:M keeps min(4, t) columns and 2 of t in each row; with fewer than V rows left, the last strip is shorter. A strip
of C < 4 * ceil(C / M) columns keeps all of them; its last group then has fewer than 4, and each row keeps 2 of those.
Equal scores: the lowest index is kept. V:N:M is from VENOM (arXiv 2310.02065) and "Beyond 2:4" (arXiv 2410.16135).

>>> str(Pattern.parse("64:2:5")), Pattern.parse("64:2:5").words
('64:2:5', 'keep 2 of 5 (60 % zeros), V=64')
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, ClassVar

from sparsec.columns import Solver
from sparsec.errors import PatternError
from sparsec.grouping import (
    MOST_COMPARED,
    Violations,
    kept_of,
    largest,
    most_in,
    offenders,
    offsets_of,
    pad_columns,
    two_of_four,
)
from sparsec.pattern_base import MAX_M, Pattern
from sparsec.selection import Selection
from sparsec.vnm import VNM, SharedColumns, Strip

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MAX_M", "NM", "VNM", "Dense", "Pattern", "SharedColumns", "Strip", "Unstructured", "Violations"]
__all__ += ["kept_columns"]

_CHUNK_ELEMENTS = 1 << 17  # a projection works on about this many scores at once: they stay in cache
_NUMBER = "([0-9]{1,9})"
_GRAMMAR = "N:M such as 2:4, V:N:M such as 64:2:5 or 64:2:5@strip, 64:2:5+2:4, unstructured:0.7, or dense (N kept)"


def read(text: str) -> Pattern:
    """See `Pattern.parse`."""
    if "+" in text:
        from sparsec.intersection import both  # late: it is made of the patterns that are defined here

        return both(text)
    if text == "dense":
        return Dense()
    if match := re.fullmatch(r"unstructured:([0-9]*\.?[0-9]+)", text):
        return Unstructured(float(match[1]))
    if match := re.fullmatch(rf"{_NUMBER}:{_NUMBER}", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}(@window|@strip)?", text):
        family = Strip if match[4] == "@strip" else VNM
        return family(int(match[1]), int(match[2]), int(match[3]))
    raise PatternError(f"pattern {text!r} cannot be read; expected {_GRAMMAR}")


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

    def _follows_from(self, other: Pattern) -> bool:
        return True

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

    def _follows_from(self, other: Pattern) -> bool:
        return isinstance(other, Unstructured) and other.sparsity >= self.sparsity

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

    def _follows_from(self, other: Pattern) -> bool:
        return other.most_in(self.m) <= self.n

    def most_in(self, window: int) -> int:
        return most_in(self.n, self.m, window)

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        import torch

        batch, rows, cols = score.shape
        flat = score.reshape(batch * rows, cols)
        step = max(1, _CHUNK_ELEMENTS // cols)
        kept = [largest(pad_columns(part, self.m), self.n) for part in flat.split(step)]
        return Selection(torch.cat(kept).view(batch, rows, -1, self.n))

    def choose(self, score: Tensor, columns: Solver = "greedy") -> tuple[Selection, Tensor]:
        import torch

        score = self._checked(score)
        cols = score.shape[2]
        if cols % self.m or self.m > MOST_COMPARED:
            return super().choose(score, columns)
        if (self.n, self.m) == (2, 4):
            mask, offsets = two_of_four(score)
            return Selection(offsets), mask
        positions, masks = [], []
        for part in score.flatten(0, 1).split(max(1, _CHUNK_ELEMENTS // cols)):
            kept = kept_of(part.unflatten(1, (-1, self.m)).permute(2, 0, 1).contiguous(), self.n)
            positions.append(offsets_of(kept, self.n))
            masks.append(torch.stack(kept.unbind(0), 2).flatten(1))
        shape = (*score.shape[:2], -1)
        selection = Selection(torch.cat(positions).unflatten(0, score.shape[:2]))
        return selection, torch.cat(masks).view(shape)

    def mask(self, selection: Selection, cols: int) -> Tensor:
        import torch

        positions = selection.positions
        if self.m in (4, 8):  # a group of bytes is one integer: nothing is scattered
            word = torch.int32 if self.m == 4 else torch.int64
            bits = [
                torch.ones((), dtype=word, device=positions.device) << 8 * place.to(word)
                for place in positions.unbind(3)
            ]
            return functools.reduce(torch.bitwise_or, bits).view(torch.bool).flatten(2)[..., :cols]
        mask = torch.zeros(*positions.shape[:3], self.m, dtype=torch.bool, device=positions.device)
        return mask.scatter_(3, positions.long(), True).flatten(2)[..., :cols]

    def violations(self, weight: Tensor) -> Violations:
        import torch

        nonzero = pad_columns((weight != 0).flatten(0, 1), self.m, fill=False)
        counts = nonzero.view(torch.uint8).permute(2, 0, 1).sum(0, dtype=torch.int16)  # faster than along short groups
        return offenders(counts.view(*weight.shape[:2], -1), self.n, "row", 1)


def kept_columns(pattern: Pattern, selection: Selection, cols: int) -> tuple[Tensor, Tensor]:
    """Absolute column of every kept slot, (batch, rows, groups, N) int64 in range, and which slots are padding."""
    import torch

    positions = selection.positions.long()
    if isinstance(pattern, SharedColumns):
        index = pattern.absolute_columns(selection, cols).gather(3, positions)
        padding = torch.zeros_like(index, dtype=torch.bool)
        padding[:, :, -1] = positions[:, :, -1] >= pattern.real_slots(cols)
        return index, padding
    assert isinstance(pattern, NM)
    index = positions + torch.arange(positions.shape[2], device=positions.device)[:, None] * pattern.m
    return index.clamp(max=cols - 1), index >= cols
