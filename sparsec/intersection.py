"""Two patterns at once, such as 64:2:5+2:4: weights that one kernel runs as 64:2:5 and another as 2:4.

Columns are chosen for the first pattern alone. Then every row is solved exactly, by a dynamic programme whose state is
what its window of the first pattern and its group of the second may still keep (9 states for 64:2:5+2:4). Where both
begin anew, after lcm(M, M') columns, nothing is carried over: such segments of all rows are solved side by side.

A spare slot of the stored tables is a weight of 0 to a kernel: it reads the activation there, as of any kept weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.columns import Solver
from sparsec.errors import PatternError
from sparsec.grouping import Violations, largest, pad_columns
from sparsec.pattern import NM, VNM, kept_columns
from sparsec.pattern_base import Pattern
from sparsec.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_STATES = 1 << 20  # values of states held at once: they stay in cache


@dataclass(frozen=True)
class Intersection(Pattern):
    """Both patterns hold. Weights are stored and run as `first`; `second` only takes some more of them away.

    A group of `first` may then keep fewer than N; its spare slots hold the value 0 (see `Selection.kept`). No weight
    that is left out could be kept besides: a mask keeps all it may, with the largest summed score for its columns.
    """

    first: NM | VNM
    second: NM

    def __post_init__(self) -> None:
        if not isinstance(self.first, (NM, VNM)) or not isinstance(self.second, NM):
            raise PatternError(
                f"pattern {self}: expected N:M or V:N:M, which is what runs, then + and N:M, such as 64:2:5+2:4; found "
                f"{self.first} and {self.second}"
            )

    def __str__(self) -> str:
        return f"{self.first}+{self.second}"

    @property
    def density(self) -> float:
        """The most that can stay where no tail is involved: what the sparser of the two keeps. Reports measure."""
        return min(self.first.density, self.second.density)

    @property
    def words(self) -> str:
        return f"{self.first.words}, and at most {self.second.n} of every {self.second.m} columns"

    @property
    def executable(self) -> Pattern:
        return self.first

    def implies(self, other: Pattern) -> bool:
        return super().implies(other) or self.first.implies(other) or self.second.implies(other)

    def _follows_from(self, other: Pattern) -> bool:
        return other.implies(self.first) and other.implies(self.second)

    def most_in(self, window: int) -> int:
        return min(self.first.most_in(window), self.second.most_in(window))

    def _project(self, score: Tensor, columns: Solver) -> Selection:
        return self.within(score, self.first.project(score, columns))[0]

    def choose(self, score: Tensor, columns: Solver = "greedy") -> tuple[Selection, Tensor]:
        score = self._checked(score)
        return self.within(score, self.first.project(score, columns))

    def within(self, score: Tensor, chosen: Selection) -> tuple[Selection, Tensor]:
        """Selection and mask of largest score (batch, rows, cols), in the columns of a selection of `first`."""
        import torch

        first, second, (*lines, cols) = self.first, self.second, score.shape
        if isinstance(first, VNM):
            index = first.absolute_columns(chosen, cols)
            reach = torch.zeros(score.shape, dtype=torch.bool, device=score.device)
            score = score.masked_fill(~reach.scatter_(2, index.flatten(2), True), -1)
        mask = _best(score.flatten(0, 1), (first.n, first.m), (second.n, second.m)).view(score.shape)
        flags = mask.view(torch.uint8) + 1  # of slots: kept 2, in reach 1, padding 0
        if isinstance(first, VNM):
            slots = flags.gather(2, index.flatten(2)).view(index.shape)
            slots[:, :, -1, first.real_slots(cols) :] = 0
        else:
            slots = pad_columns(flags.flatten(0, 1), first.m, fill=0).unflatten(0, lines)
        positions = largest(slots.flatten(0, 1), first.n).unflatten(0, lines)
        return Selection(positions, chosen.columns, slots.gather(3, positions.long()) == 2), mask

    def kept_of_score(self, score: Tensor) -> tuple[float, float]:
        """How much of a score (batch, rows, cols) stays with `first` alone, and with both in the same columns."""
        import torch

        score = self._checked(score)
        chosen = self.first.project(score)
        masks = self.first.mask(chosen, score.shape[2]), self.within(score, chosen)[1]
        alone, together = (float(score[mask].sum(dtype=torch.float64)) for mask in masks)
        return alone, together

    def mask(self, selection: Selection, cols: int) -> Tensor:
        """Without a table `kept`, as from stored tables, all that `first` selects."""
        import torch

        if selection.kept is None:
            return self.first.mask(selection, cols)
        index, padding = kept_columns(self.first, selection, cols)
        kept = (selection.kept & ~padding).view(torch.uint8)  # added: a padding slot names a column of another slot
        counts = torch.zeros(*index.shape[:2], cols, dtype=torch.uint8, device=index.device)
        return counts.scatter_add_(2, index.flatten(2), kept.flatten(2)).view(torch.bool)

    def violations(self, weight: Tensor) -> Violations:
        """Of each of the two."""
        found = [(pattern, pattern.violations(weight)) for pattern in (self.first, self.second)]
        first = tuple(f"{text} ({pattern})" for pattern, one in found for text in one.first)
        return Violations(sum(one.count for _, one in found), first[:3])


def both(text: str) -> Pattern:
    """Read `64:2:5+2:4`; where the first pattern implies the second, that is the first: 64:2:8+2:4 is 64:2:8."""
    parts = text.split("+")
    if len(parts) != 2:
        raise PatternError(f"pattern {text!r} joins {len(parts)} patterns; expected two, such as 64:2:5+2:4")
    try:
        first, second = map(Pattern.parse, parts)
    except PatternError as error:
        raise PatternError(f"pattern {text!r}: {error}") from None
    found = Intersection(first, second)  # type: ignore[arg-type]  # it checks
    return found.first if found.first.implies(found.second) else found


def joined(text: str, also: str) -> str:
    """A pattern's text such that `also`, N:M, holds too: `text+also`, or the text itself where it does anyway.

    >>> joined("64:2:5", "2:4"), joined("64:2:8", "2:4"), joined("dense", "2:4")
    ('64:2:5+2:4', '64:2:8', 'dense')
    """
    pattern, second = Pattern.parse(text), Pattern.parse(also)
    if not isinstance(second, NM):
        raise PatternError(f"pattern {also!r} cannot be added; expected N:M, such as 2:4; found {text} and {also}")
    if pattern.density == 1 or pattern.implies(second):
        return text
    return str(both(f"{pattern}+{also}"))


def towards_2_4(pattern: Pattern) -> str:
    """What to do where a pattern does not imply 2:4, the only one that NVIDIA's own kernels know.

    >>> towards_2_4(Pattern.parse("64:2:5")), towards_2_4(Pattern.parse("64:2:5@strip"))
    ('add --also 2:4, or choose 2:4 or 64:2:8', 'choose 2:4 or 64:2:8')
    """
    joins = "add --also 2:4, or " if isinstance(pattern, (NM, VNM)) else ""
    return f"{joins}choose 2:4 or 64:2:8"


def _best(score: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """Which scores (rows, cols) to keep, bool: at most n of every m columns, for both (n, m); below 0, never.

    The largest sum (float32), and all that may be kept besides; of equal ones the lowest columns.
    """
    import torch

    rows, cols = score.shape
    span = min(math.lcm(first[1], second[1]), cols)
    states = (first[0] + 1) * (second[0] + 1)
    segments = pad_columns(score, span).flatten(0, 1)  # (rows * segments, span), padding at -1
    parts = segments.split(max(1, _CHUNK_STATES // (span * states)))
    kept = [_solve(part.T.contiguous(), first, second) for part in parts]
    return torch.cat(kept, 1).T.reshape(rows, -1)[:, :cols]


def _solve(score: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """`_best` of scores (cols, segments); columns are taken one by one, all segments at once.

    A state is (a, b): how many more the window of the first and the group of the second may keep. From the last column
    to the first, `worth[a, b]` is what the columns from there on can still add, and whether taking one is best there;
    then the choices are read off from the first column on.
    """
    import torch

    (n, m), (n2, m2) = first, second
    cols, count = score.shape
    take = torch.zeros(cols, n + 1, n2 + 1, count, dtype=torch.bool, device=score.device)
    worth = score.new_zeros(n + 1, n2 + 1, count)
    for j in reversed(range(cols)):
        if (j + 1) % m == 0:
            worth = worth[n:].expand(n + 1, -1, -1)
        if (j + 1) % m2 == 0:
            worth = worth[:, n2:].expand(-1, n2 + 1, -1)
        taken, left = worth[:-1, :-1] + score[j], worth[1:, 1:]
        # A weight of 0 waits for `_fill`: it must not take a place that a small one to its right would not outweigh.
        better = torch.ge(taken, left, out=take[j, 1:, 1:]).logical_and_(score[j] > 0)
        worth = worth.clone()
        worth[1:, 1:] = taken.where(better, left)
    kept = torch.empty_like(score, dtype=torch.bool)
    a = b = torch.zeros(count, dtype=torch.int64, device=score.device)
    for j in range(cols):
        a = a.new_full((count,), n) if j % m == 0 else a
        b = b.new_full((count,), n2) if j % m2 == 0 else b
        kept[j] = take[j].flatten(0, 1).gather(0, (a * (n2 + 1) + b)[None])[0]
        a, b = a - kept[j].view(torch.uint8), b - kept[j].view(torch.uint8)
    return _fill(kept, score == 0, first, second) if bool((score == 0).any()) else kept


def _fill(kept: Tensor, zero: Tensor, first: tuple[int, int], second: tuple[int, int]) -> Tensor:
    """Keep zeros too where there is room, the lowest columns first; all (cols, segments)."""
    (n, m), (n2, m2) = first, second
    for j in range(len(kept)):
        window, group = kept[j // m * m : j // m * m + m], kept[j // m2 * m2 : j // m2 * m2 + m2]
        kept[j] |= zero[j] & (window.sum(0) < n) & (group.sum(0) < n2)
    return kept
