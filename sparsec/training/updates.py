"""Updates: how masks act while they still change. Once they are final, all methods train as `Hard` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsec.training.masks import factors
from sparsec.training.parts import Act, Project, Tracked

_RATIO, _FACTOR = 10.0, 2.0  # of residual balancing: Boyd et al. 2011, "Distributed optimization ... ADMM", 3.4.1


@dataclass(frozen=True)
class Hard:
    """What is masked gets no gradient, but is not zero before masks are final: it can return when they move."""

    act: ClassVar[Act] = "hard"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        """There is no state."""

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        for one in sites:
            one.tensors["mask"] = project(one, one.parameter.detach())
        kept = sum(int(one.tensors["mask"].sum()) for one in sites)
        return {"density": kept / max(sum(one.parameter.numel() for one in sites), 1)}

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        """The graph has no gradient for what is masked."""


@dataclass(frozen=True)
class StraightThrough:
    """SR-STE (Zhou et al., arXiv 2102.04010): g + decay (1 - mask) w, g the gradient of the masked weight.

    The graph computes with where(mask, w, 0) and hands g to all weights; the mask is that of the weights now.
    """

    decay: float
    act: ClassVar[Act] = "through"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        self.choose(sites, project, numbers)

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        changed = total = 0
        for one in sites:
            mask, old = project(one, one.parameter.detach()), one.tensors.get("mask")
            changed += int((mask ^ old).count_nonzero()) if old is not None else 0
            total += mask.numel()
            one.tensors["mask"] = mask
        return {"changed": changed / max(total, 1)}

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        for one in sites:
            one.gradient.addcmul_(one.parameter.detach(), factors(~one.tensors["mask"]), value=self.decay)


@dataclass(frozen=True)
class Penalty:
    """ADMM (NxMTransformer, arXiv 2110.15766): gradient + rho (w - z + u); then z = Pi(w + u), u += w - z.

    Pi is the Euclidean projection on the pattern. u is scaled (the multiplier over rho), so it is divided when rho is
    multiplied. The first dual update is made before the first step, as the paper's code does, with u = 0.

    After a dual update u = w + u - z, so z is w + u where the mask is 1, u is w + u where it is 0, and each is 0 where
    the other is not. Kept are the mask and `pull` = z - u in float32: five bytes a weight, two passes a step.
    """

    rho: float
    balance: Literal["constant", "balanced"] = "constant"
    """balanced: rho doubles where the primal residual is 10 times the dual one, and halves where it is the reverse."""
    act: ClassVar[Act] = "nothing"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        numbers["rho"] = self.rho
        self._dual(sites, project)

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        primal, moved, norm = self._dual(sites, project)
        rho, dual = float(numbers["rho"]), float(numbers["rho"]) * moved
        if self.balance == "balanced" and (primal > _RATIO * dual or dual > _RATIO * primal):
            factor = _FACTOR if primal > dual else 1 / _FACTOR
            numbers["rho"] = rho * factor
            for one in sites:
                z, u = self.parts(one)
                one.tensors["pull"] = z.sub_(u.div_(factor))
        return {"primal": primal / max(norm, 1e-30), "dual": dual / max(norm, 1e-30), "rho": rho}

    def parts(self, one: Tracked) -> tuple[Tensor, Tensor]:
        """z and u of a site; zeros before the first dual update."""
        pull = one.tensors.get("pull")
        if pull is None:
            zeros = torch.zeros_like(one.parameter.detach(), dtype=torch.float32)
            return zeros, zeros.clone()
        z = pull * factors(one.tensors["mask"])
        return z, z - pull

    def _dual(self, sites: Sequence[Tracked], project: Project) -> tuple[float, float, float]:
        """Update z and u. Returns the norms, over all sites, of w - z, of the change of z, and of w."""
        primal, moved, norm = [], [], []
        for one in sites:
            weight, (old, u) = one.parameter.detach().float(), self.parts(one)
            target = u.add_(weight)
            mask = project(one, target)
            z = target * factors(mask)
            moved.append(_length(old.sub_(z)))
            primal.append(_length(torch.sub(weight, z, out=old)))
            norm.append(_length(weight))
            one.tensors |= {"mask": mask, "pull": z.mul_(2).sub_(target)}
        return math.hypot(*primal), math.hypot(*moved), math.hypot(*norm)

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        rho = float(numbers["rho"])
        for one in sites:
            one.gradient.add_(one.parameter.detach(), alpha=rho).sub_(one.tensors["pull"], alpha=rho)


def _length(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
