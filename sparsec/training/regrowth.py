"""Updates under which what is pruned can come back: its gradient, not its magnitude, decides about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sparsec.training.masks import factors
from sparsec.training.parts import Act, Project, Tracked
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class Zeroed:
    """PLATON: weights that are not chosen are set to zero, then trained on as all others until masks move again."""

    act: ClassVar[Act] = "nothing"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        """There is no state."""

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        kept = 0
        for one in sites:
            mask = project(one, one.parameter.detach())
            kept += int(mask.count_nonzero())
            one.parameter.masked_fill_(~mask, 0.0)
        return {"density": kept / max(sum(one.parameter.numel() for one in sites), 1)}

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        """All weights have their gradient."""


@dataclass(frozen=True)
class Scored(Hard):
    """Movement pruning: the criterion sees every weight's gradient, the optimizer that of kept ones."""

    act: ClassVar[Act] = "through"

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        for one in sites:
            if "mask" in one.tensors:
                one.gradient.mul_(factors(one.tensors["mask"]))
