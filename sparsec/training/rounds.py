"""Rounds: train, prune a step of the weights, begin anew with those that are left, as lottery tickets are found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.pattern import NM, Pattern, Unstructured
from sparsec.sites import Site
from sparsec.training.parts import Clock, Method, Schedule, Tracked
from sparsec.training.schedules import thinned

_ALIVE = 1e-15  # least score of a weight that is left, of which even the square is not 0


@dataclass(frozen=True)
class Rounds:
    """After each round, a share `every` of the steps, another `step` of all weights is pruned, until the pattern holds.

    N:M keeps fewer and fewer of its M, unstructured patterns a lower density. Any other pattern is pruned once, by the
    round that reaches its density: blocks of one M do not lie inside those of a smaller one, so weights would return.
    """

    step: float = 0.1
    every: float = 0.1

    def check(self, clock: Clock) -> None:
        if self.every * clock.steps < 1:
            raise UsageError(
                f"a round has no step: every={self.every:g} of {clock.steps} steps; train longer, or raise every"
            )

    def rounds(self, pattern: Pattern) -> int:
        """After how many rounds the pattern holds."""
        return max(math.ceil((1 - pattern.density) / self.step - 1e-9), 1)

    def misfit(self, pattern: Pattern) -> str | None:
        count = self.rounds(pattern)
        if (count + 1) * self.every <= 1 + 1e-9:
            return None
        return (
            f"{pattern} is reached after {count} rounds, each prunes step={self.step:g} of all weights, and one more "
            f"trains what is left, but each takes every={self.every:g} of the steps: raise step, or set every to "
            f"{1 / (count + 1):.3g} or less"
        )

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        return not epoch_ends and self._done(clock) > self._done(replace(clock, step=clock.step - 1))

    def frozen_from(self, clock: Clock) -> int:
        return clock.steps

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        target, done = site.pattern, self._done(clock)
        assert target is not None
        if done >= self.rounds(target):
            return target
        return thinned(target, 1 - self.step * done) if isinstance(target, (NM, Unstructured)) else None

    def _done(self, clock: Clock) -> int:
        return math.floor(clock.step / (self.every * clock.steps) + 1e-9)


@dataclass(frozen=True)
class Left:
    """|w| of what is left; a weight that was pruned scores 0, and never returns."""

    def observe(self, one: Tracked) -> None:
        """Gradients do not count."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        size, mask = weight.abs().float(), one.tensors.get("mask")
        return size if mask is None else torch.where(mask, size.clamp(min=_ALIVE), 0.0)


def bounds(schedule: Schedule, sites: Sequence[Site], clock: Clock) -> tuple[int, ...]:
    """The steps after which some site gets another pattern, between 0 and the number of all steps."""
    found, before = [0], [schedule.pattern(site, replace(clock, step=0)) for site in sites]
    for now in (replace(clock, step=step) for step in range(1, clock.steps)):
        if schedule.fires(now, epoch_ends=False):
            patterns = [schedule.pattern(site, now) for site in sites]
            if patterns != before:
                found.append(now.step)
            before = patterns
    return (*found, clock.steps)


def refuse(method: Method) -> None:
    """Raise UsageError for a method that another loop than sparsec's own could not begin anew."""
    if method.restart != "no":
        raise UsageError(
            "the method begins anew after every round, with the optimizer and its rate or with weights too, which a "
            "Trainer's hooks cannot do; train with the pass imp, or give Method(restart='no')"
        )
