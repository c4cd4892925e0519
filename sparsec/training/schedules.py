"""Schedules: once, every k steps or epochs, and the cubic path of gradual pruning."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsec.errors import UsageError
from sparsec.pattern import NM, Pattern, SharedColumns, Strip, Unstructured
from sparsec.sites import Site
from sparsec.training.parts import Clock


@dataclass(frozen=True)
class Once:
    """Masks are final before the first step."""

    def check(self, clock: Clock) -> None:
        """Any length will do."""

    def misfit(self, pattern: Pattern) -> str | None:
        return None

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        return False

    def frozen_from(self, clock: Clock) -> int:
        return 0

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        return site.pattern


@dataclass(frozen=True)
class Repeated:
    """Every `every` steps, or at the end of each epoch (0); masks are final for the last `frozen_epochs`."""

    every: int = 0
    frozen_epochs: int = 0

    def check(self, clock: Clock) -> None:
        free = self.frozen_from(clock)
        if free < max(1, self.every or clock.per_epoch):
            raise UsageError(
                f"masks would never be chosen anew: {clock.steps} steps of {clock.per_epoch} an epoch, of which "
                f"{max(free, 0)} before they are frozen, and they change every "
                f"{f'{self.every} steps' if self.every else 'epoch'}; train longer, or lower every or frozen_epochs"
            )

    def misfit(self, pattern: Pattern) -> str | None:
        return None

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        return not epoch_ends and clock.step % self.every == 0 if self.every else epoch_ends

    def frozen_from(self, clock: Clock) -> int:
        return clock.steps - self.frozen_epochs * clock.per_epoch

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        return site.pattern


@dataclass(frozen=True)
class Cubic:
    """Density falls from 1 to the pattern's, d + (1 - d) (1 - t)^3, t from 0 to 1 between `start` and `end`.

    Shares of all steps. (Zhu and Gupta, arXiv 1710.01878.) N:M keeps fewer and fewer of its M; V:N:M, which keeps 2,
    has an M that grows from 4 on; unstructured patterns follow the density. The target holds exactly from `end` on.
    """

    start: float = 0.0
    end: float = 0.6
    every: int = 10

    def check(self, clock: Clock) -> None:
        first, last = self.start * clock.steps, self.frozen_from(clock)
        if last - first < self.every:
            raise UsageError(
                f"the pattern cannot be reached gradually: of {clock.steps} steps, {max(last - first, 0):.0f} lie "
                f"between start={self.start:g} and end={self.end:g}, and masks change every {self.every}; train longer "
                "or set every lower"
            )

    def misfit(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, (NM, SharedColumns, Unstructured)):
            return None
        return f"gradual pruning is defined for N:M, V:N:M and unstructured patterns, found {pattern}"

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        return not epoch_ends and clock.step % self.every == 0 and clock.step > self.start * clock.steps

    def frozen_from(self, clock: Clock) -> int:
        return round(self.end * clock.steps)

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        target, first = site.pattern, self.start * clock.steps
        assert target is not None
        done = min(max((clock.step - first) / max(self.frozen_from(clock) - first, 1), 0.0), 1.0)
        density = target.density + (1 - target.density) * (1 - done) ** 3
        return target if done == 1 else thinned(target, density)


def thinned(target: Pattern, density: float) -> Pattern | None:
    """The pattern on the way to `target` that keeps this share of the weights, about; None where it keeps all."""
    if density >= 1:
        return None
    if isinstance(target, NM):
        kept = math.ceil(density * target.m - 1e-9)
        return NM(kept, target.m) if kept < target.m else None
    if isinstance(target, SharedColumns):
        m = min(math.floor(target.n / density + 1e-9), target.m)
        family = Strip if isinstance(target, Strip) else type(target)
        return family(target.v, target.n, m) if m >= 4 else None
    return Unstructured(1 - density) if density < 1 - 1e-6 else None
