"""Updates: how masks act while they still change. Once they are final, all methods train as `Hard` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

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
            changed += int((mask != old).sum()) if old is not None else 0
            total += mask.numel()
            one.tensors["mask"] = mask
        return {"changed": changed / max(total, 1)}

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        for one in sites:
            weight = one.parameter.detach()
            one.gradient.add_(weight.masked_fill(one.tensors["mask"], 0.0), alpha=self.decay)


@dataclass(frozen=True)
class Penalty:
    """ADMM (NxMTransformer, arXiv 2110.15766): gradient + rho (w - z + u); then z = Pi(w + u), u += w - z.

    Pi is the Euclidean projection on the pattern. u is scaled (the multiplier over rho), so it is divided when rho is
    multiplied. z and u are float32: two more numbers a weight. The first dual update is made before the first step, as
    the paper's code does, with u = 0.
    """

    rho: float
    balance: Literal["constant", "balanced"] = "constant"
    """balanced: rho doubles where the primal residual is 10 times the dual one, and halves where it is the reverse."""
    act: ClassVar[Act] = "nothing"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        numbers["rho"] = self.rho
        for one in sites:
            one.tensors["u"] = torch.zeros_like(one.parameter.detach(), dtype=torch.float32)
        self._dual(sites, project)

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        primal, moved, norm = self._dual(sites, project)
        rho, dual = float(numbers["rho"]), float(numbers["rho"]) * moved
        if self.balance == "balanced" and (primal > _RATIO * dual or dual > _RATIO * primal):
            factor = _FACTOR if primal > dual else 1 / _FACTOR
            numbers["rho"] = rho * factor
            for one in sites:
                one.tensors["u"].div_(factor)
        return {"primal": primal / max(norm, 1e-30), "dual": dual / max(norm, 1e-30), "rho": rho}

    def _dual(self, sites: Sequence[Tracked], project: Project) -> tuple[float, float, float]:
        """Update z and u. Returns the norms, over all sites, of w - z, of the change of z, and of w."""
        primal = moved = norm = 0.0
        for one in sites:
            weight, u = one.parameter.detach().float(), one.tensors["u"]
            target = weight + u
            z = target.masked_fill(~project(one, target), 0.0)
            gap = weight - z
            u.add_(gap)
            primal += float(gap.square().sum())
            moved += float((z - one.tensors.get("z", 0.0)).square().sum())
            norm += float(weight.square().sum())
            one.tensors["z"] = z
        return primal**0.5, moved**0.5, norm**0.5

    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        for one in sites:
            pull = one.parameter.detach() - one.tensors["z"] + one.tensors["u"]
            one.gradient.add_(pull.to(one.gradient.dtype), alpha=float(numbers["rho"]))
