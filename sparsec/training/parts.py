"""What a method of sparse training is made of, beside the pattern: criterion, schedule, update. Small values all.

The criterion scores weights, the pattern keeps the best of them, the schedule says when it chooses anew and to what
pattern, the update how the choice acts on training. Adding a method is mostly adding one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor, nn

from sparsec.columns import Solver
from sparsec.pattern import Pattern
from sparsec.selection import Selection
from sparsec.sites import Site


@dataclass(frozen=True)
class Clock:
    """How far training is, in optimizer steps."""

    steps: int
    """Of the whole training."""
    per_epoch: int
    step: int = 0
    """That are done."""


WHOLE = "whole"
"""Among a site's tensors: the weights that masks are taken of, where the parameter holds something else."""


@dataclass
class Tracked:
    """A sparse site while it is trained. Tensors have the parameter's own layout, so that they meet its gradient."""

    site: Site
    parameter: nn.Parameter
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """State by name, `mask` among them once weights are left out."""
    selection: Selection | None = None
    """The choice of `mask`, once it is final."""

    @property
    def gradient(self) -> Tensor:
        """The parameter's gradient; zeros are put there when no sample reached the weight."""
        if self.parameter.grad is None:
            self.parameter.grad = self.parameter.new_zeros(self.parameter.shape)
        return self.parameter.grad


class Criterion(Protocol):
    """Scores weights. What it remembers lies in `Tracked.tensors`."""

    def observe(self, one: Tracked) -> None:
        """Look at a complete gradient, before anything is added to it."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        """Scores of a weight in the parameter's layout, not negative."""


@dataclass(frozen=True)
class Magnitude:
    """|w|: with columns chosen by `l2`, keeping the largest is the Euclidean projection."""

    def observe(self, one: Tracked) -> None:
        """Gradients do not count."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        return weight.abs()


class Schedule(Protocol):
    """When masks are chosen, and from which step on they stay."""

    def check(self, clock: Clock) -> None:
        """Raise UsageError when a training of this length cannot reach the end of the schedule."""

    def misfit(self, pattern: Pattern) -> str | None:
        """Why a pattern cannot be reached this way, or None."""

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        """Whether masks are chosen anew now: after a step, or when an epoch ends."""

    def frozen_from(self, clock: Clock) -> int:
        """After how many steps the masks are final."""

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        """What a site follows now, ending in its own pattern; None while nothing is left out."""


Project = Callable[[Tracked, Tensor], Tensor]
"""The mask, in the parameter's layout, of a weight for the pattern that the schedule gives now."""
Scope = Literal["local", "global"]
Restart = Literal["no", "optimizer", "all"]
Act = Literal["nothing", "hard", "through"]
"""What a mask does in the graph: nothing, where(mask, w, 0), or that with the gradient of all weights."""


class Update(Protocol):
    """How masks act on training until they are final. `numbers` is state that is one for all sites."""

    act: ClassVar[Act]

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        """Set up the state before the first step."""

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        """The schedule fired. Returns what belongs in curves, by name."""

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        """Change complete, clipped gradients before the optimizer steps."""


@dataclass(frozen=True)
class Method:
    """Criterion x schedule x update x scope; the patterns are the sites'."""

    schedule: Schedule
    update: Update
    criterion: Criterion = Magnitude()
    columns: Solver = "l2"
    """How a V:N:M block's columns are chosen: l2 is what a Euclidean projection needs."""
    scope: Scope = "local"
    """global: unstructured sites share one budget; see `sparsec.training.scope`."""
    restart: Restart = "no"
    """What begins anew when a site gets another pattern: moments and the rate, or (all) parameters and statistics too.

    The loop's work, as an engine sees no more than masks."""
