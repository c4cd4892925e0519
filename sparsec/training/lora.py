"""Low-rank training in three stages (V:N:M paper, arXiv 2410.16135): dense, under masks that move, under fixed ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.pattern import NM, VNM, Pattern, Unstructured
from sparsec.sites import Site
from sparsec.training.parts import Act, Clock, Project, Tracked

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam


@dataclass(frozen=True)
class Stages:
    """Stage 1 has no mask, in stage 2 masks are chosen at its first step and every `every`, in stage 3 they stay.

    `stage1` and `stage2` are shares of the steps, of one step at least; 0 leaves the stage out. With no stage 2 masks
    are chosen once.
    """

    stage1: float = 0.05
    stage2: float = 0.05
    every: int = 5

    def bounds(self, steps: int) -> tuple[int, int]:
        """After how many steps masks are chosen for the first and for the last time."""
        first, more = (max(1, round(share * steps)) if share else 0 for share in (self.stage1, self.stage2))
        return first, first + more

    def chooses(self, step: int, steps: int) -> bool:
        """Whether masks are chosen after this step; 0 is before the first."""
        first, last = self.bounds(steps)
        return step == last or (first <= step < last and (step - first) % self.every == 0)

    def check(self, clock: Clock) -> None:
        first, last = self.bounds(clock.steps)
        if self.stage2 and last - first < self.every:
            raise UsageError(
                f"masks would not move in stage 2: it has {last - first} of {clock.steps} steps (stage2="
                f"{self.stage2:g}) and they are chosen every {self.every}; train longer, raise stage2 or lower every "
                "(stage2=0 chooses them once)"
            )
        if last >= clock.steps:
            raise UsageError(
                f"nothing is left for stage 3: stages 1 and 2 take {last} of {clock.steps} steps; train longer, or "
                "lower stage1 or stage2"
            )

    def misfit(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, (NM, VNM, Unstructured)):
            return None
        return (
            f"three-stage-lora is defined for N:M, V:N:M and unstructured patterns, found {pattern}, whose rows or "
            "groups are chosen with the mask, so weights under a fixed mask do not lead back to it; use admm or sr-ste"
        )

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        return not epoch_ends  # what the model computes with is new after every step

    def frozen_from(self, clock: Clock) -> int:
        return clock.steps

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        return site.pattern


@dataclass(frozen=True)
class Relative:
    """|w| / (sum of its column) + |w| / (sum of its row): RIA (ICLR 2024) without its factor of input norms."""

    def observe(self, one: Tracked) -> None:
        """Gradients do not count."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        size = one.site.view.to_matrices(weight).abs().float()
        columns, rows = (size.sum(axis, keepdim=True).clamp_(min=1e-30) for axis in (1, 2))
        return one.site.view.to_parameter(size / columns + size / rows)


@dataclass(frozen=True)
class MaskedLora:
    """The model computes with where(mask, W + scale B A, 0); A (batch, rank, cols) and B (batch, rows, rank) train.

    1. The parameter holds that value, and its gradient G gives dB = scale (G mask) A^T and dA = scale B^T (G mask).
       Then it has none of its own, so optimizers leave it alone. Without a mask (stage 1) all of G counts.
    2. A and B are stepped by Adam, `lr` falling linearly to 0. A begins uniform within 1 / sqrt(cols), B at 0.
    3. Masks are chosen of W + scale B A, which becomes W, also where it is masked: weights can return. A, B and their
       moments begin anew, so that all merges together may have a higher rank than one.
    4. No mask is chosen anew at the end: what a pattern keeps of the parameter are all that is not 0 in it.
    """

    lr: float
    stages: Stages
    rank: int = 16
    alpha: float = 32.0
    act: ClassVar[Act] = "nothing"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @torch.no_grad()
    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        numbers |= {"seed": numbers.get("seed", 0), "updates": 0, "merges": 0, "since": 0}
        for one in sites:
            _, rows, cols = one.site.shape
            if self.rank > min(rows, cols):
                raise UsageError(
                    f"{one.site.name}: rank is {self.rank}, but its matrices are {rows} x {cols}; expected a rank of "
                    f"at most {min(rows, cols)}: lower it, or exclude the site"
                )
            one.tensors["base"] = one.parameter.detach().clone()
            self._renew(one, numbers)
        if not self.stages.stage1:
            self._merge(sites, project, numbers)
            for one in sites:
                self._put(one)

    @torch.no_grad()
    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        step = int(numbers["updates"])
        due = self.stages.chooses(step, round(step / float(numbers["share"])))
        curves = {"changed": self._merge(sites, project, numbers)} if due else {}
        for one in sites:
            self._put(one)
        return curves

    @torch.no_grad()
    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        numbers["updates"], numbers["since"] = int(numbers["updates"]) + 1, int(numbers["since"]) + 1
        lr = self.lr * (1 - float(numbers["share"]))
        for one in sites:
            state, gradient = one.tensors, one.gradient
            if "mask" in state:
                gradient = torch.where(state["mask"], gradient, 0.0)
            by_product = one.site.view.to_matrices(gradient).float() * self.scale
            gradients = {"a": state["b"].mT @ by_product, "b": by_product @ state["a"].mT}
            for name, found in gradients.items():
                _adam(state, name, found, int(numbers["since"]), lr)
            one.parameter.grad = None

    def _merge(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> float:
        """Rule 3. Returns the share of the weights that the masks now treat differently."""
        numbers["merges"], numbers["since"] = int(numbers["merges"]) + 1, 0
        changed = 0
        for one in sites:
            whole = one.tensors["base"] = self._whole(one)
            mask, old = project(one, whole), one.tensors.get("mask")
            changed += int((~mask if old is None else mask ^ old).count_nonzero())
            one.tensors["mask"] = mask
            self._renew(one, numbers)
        return changed / max(sum(one.parameter.numel() for one in sites), 1)

    def _renew(self, one: Tracked, numbers: dict[str, Any]) -> None:
        """A and B that add nothing yet; A follows from seed, site and merge alone."""
        batch, rows, cols = one.site.shape
        digest = hashlib.sha256(f"{numbers['seed']}:{numbers['merges']}:{one.site.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        a = torch.rand(batch, self.rank, cols, generator=generator).mul_(2).sub_(1).div_(math.sqrt(cols))
        device = one.parameter.device
        new = {"a": a.to(device), "b": torch.zeros(batch, rows, self.rank, device=device)}
        for name, value in new.items():
            moments = {f"{name}_mean": torch.zeros_like(value), f"{name}_square": torch.zeros_like(value)}
            one.tensors |= {name: value, **moments}

    def _whole(self, one: Tracked) -> Tensor:
        """W + scale B A in the parameter's layout and type."""
        product = (one.tensors["b"] @ one.tensors["a"]).mul_(self.scale)
        return one.tensors["base"] + one.site.view.to_parameter(product).to(one.parameter.dtype)

    def _put(self, one: Tracked) -> None:
        whole, mask = self._whole(one), one.tensors.get("mask")
        one.parameter.copy_(whole if mask is None else torch.where(mask, whole, 0.0))


def _adam(state: dict[str, Tensor], name: str, gradient: Tensor, step: int, lr: float) -> None:
    mean = state[f"{name}_mean"].lerp_(gradient, 1 - _BETA1) / (1 - _BETA1**step)
    square = state[f"{name}_square"].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    spread = (square / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
    state[name].addcdiv_(mean, spread, value=-lr)
