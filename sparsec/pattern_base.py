"""What every sparsity pattern can do. The patterns are in `sparsec.pattern`, which is where others import it from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsec.columns import Solver
from sparsec.errors import PatternError
from sparsec.grouping import Violations
from sparsec.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor

MAX_M = 256  # an offset in the group is one byte on disk


@dataclass(frozen=True)
class Pattern(ABC):
    """Base of all patterns: `Dense`, `Unstructured`, `NM`, `VNM` and `Strip`."""

    decidable: ClassVar[bool] = True
    """Whether `violations` finds every weight that breaks the pattern; if not, only `violations_of` does."""

    @staticmethod
    def parse(text: str) -> Pattern:
        """Read a pattern; raises PatternError with what was found and what is expected.

        >>> Pattern.parse("2:4")
        NM(n=2, m=4)
        """
        from sparsec.pattern import read  # late: it knows all the patterns that derive from this class

        return read(text)

    @property
    @abstractmethod
    def density(self) -> float:
        """Share of weights kept where no tail is involved."""

    @property
    @abstractmethod
    def words(self) -> str:
        """The pattern in words, echoed wherever a user could read N as the number pruned."""

    @property
    def executable(self) -> Pattern:
        """The pattern that weights are stored and run as: this one, but for an `Intersection` its first."""
        return self

    def implies(self, other: Pattern) -> bool:
        """Whether every matrix that follows this pattern is known to follow `other`, tails included.

        >>> Pattern.parse("64:2:8").implies(Pattern.parse("2:4")), Pattern.parse("64:2:5").implies(Pattern.parse("2:4"))
        (True, False)
        """
        return self == other or other._follows_from(self)

    def _follows_from(self, other: Pattern) -> bool:
        """Whether another pattern is known to imply this one."""
        return False

    def most_in(self, window: int) -> int:
        """Most weights of a row that `window` columns from a multiple of `window` on can keep, whatever the weight."""
        return window

    def project(self, score: Tensor, columns: Solver = "greedy") -> Selection:
        """Select the weights of largest summed score. `score`: (rows, cols) or (batch, rows, cols), finite, >= 0."""
        return self._project(self._checked(score), columns)

    def _checked(self, score: Tensor) -> Tensor:
        """Scores as (batch, rows, cols) float32, or PatternError."""
        import torch

        score = score.detach().to(torch.float32)
        score = score[None] if score.dim() == 2 else score
        if score.dim() != 3 or not score.numel():
            raise PatternError(f"{self}: expected scores (batch, rows, cols), not empty; found {tuple(score.shape)}")
        low, total = float(score.amin()), float(score.sum())  # NaN goes through
        if not (low >= 0 and total < float("inf")) and not 0 <= low <= float(score.amax()) < float("inf"):
            raise PatternError(f"{self}: scores must be finite and not negative; found NaN, Inf or values below 0")
        return score

    def choose(self, score: Tensor, columns: Solver = "greedy") -> tuple[Selection, Tensor]:
        """`project`, with the mask (batch, rows, cols) of what is selected."""
        selection = self.project(score, columns)
        return selection, self.mask(selection, score.shape[-1])

    @abstractmethod
    def mask(self, selection: Selection, cols: int) -> Tensor:
        """The kept weights as (batch, rows, cols) bool."""

    @abstractmethod
    def violations(self, weight: Tensor) -> Violations:
        """Where the nonzeros of `weight`, (batch, rows, cols), break the pattern. NaN counts as nonzero."""

    def violations_of(self, weight: Tensor, selection: Selection) -> Violations:
        """As `violations`; where there are none, the nonzeros outside what `selection`, of sound indices, keeps."""
        broken = self.violations(weight)
        if broken.count:
            return broken
        outside = (weight != 0) & ~self.mask(selection, weight.shape[2])
        if not bool(outside.any()):
            return Violations(0, ())
        stray = outside.nonzero()
        first = tuple(
            f"row {r}{f' of matrix {b}' if weight.shape[0] > 1 else ''}, column {c}: a nonzero that is not selected"
            for b, r, c in stray[:3].tolist()
        )
        return Violations(len(stray), first)

    @abstractmethod
    def _project(self, score: Tensor, columns: Solver) -> Selection:
        """`project` on checked scores (batch, rows, cols)."""
