"""Masks that are learnt as a choice among all ways to keep N of M, while the weights stay as they are (MaskLLM).

Of a group, `gate` has a number for each of the K = C(M, N) ways, the rows of `ways(n, m)`, (K, M).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.grouping import pad_columns
from sparsec.pattern import NM, VNM, Pattern
from sparsec.training.parts import WHOLE, Act, Project, Tracked
from sparsec.training.schedules import Repeated

LIMIT = 100
"""Ways that a group may have."""
_STD = 0.01  # of the paper's random gates, which the prior is scaled by
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam


def ways(pattern: NM) -> Tensor:
    """All masks of a group, (K, M) of 0 and 1, in lexicographic order."""
    chosen = torch.tensor(list(combinations(range(pattern.m), pattern.n)))
    return torch.zeros(len(chosen), pattern.m).scatter_(1, chosen, 1.0)


@dataclass(frozen=True)
class Learnable(Repeated):
    """After every step, for patterns whose groups have few ways."""

    every: int = 1

    def misfit(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, NM):
            count = math.comb(pattern.m, pattern.n)
            if count <= LIMIT:
                return None
            found = f"each group of {pattern} has {count}"
        elif isinstance(pattern, VNM):
            digits = math.log10(math.comb(pattern.m, 4)) + pattern.v * math.log10(6)  # C(M, 4) 6^V
            found = f"each block of {pattern} has 10^{digits:.0f}"
        else:
            found = f"{pattern} has no groups of their own, so a matrix is one choice among more than can be listed"
        return (
            f"gumbel-mask learns a number for every way to keep N of M, at most {LIMIT} of a group; {found}; choose "
            "such as 2:4, 1:4, 4:8 or 2:8, or another method"
        )


@dataclass(frozen=True)
class Likeliest:
    """Scores 1 for what the likeliest way of its group keeps, 0 for all else."""

    def observe(self, one: Tracked) -> None:
        """The gates see the gradients."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        if "gate" not in one.tensors:
            raise UsageError(f"{one.site.name} has no gates yet: its mask is learnt while training")
        return _spread(one, ways(_nm(one)).to(weight.device)[one.tensors["gate"].argmax(2)])


@dataclass(frozen=True)
class Gumbel:
    """MaskLLM (Fang et al., arXiv 2409.17481): w m, m = sum of y_k way_k, y = softmax((kappa gate + noise) / tau).

    The noise is Gumbel's, new after every step; tau and kappa move linearly while masks are learnt. Gates get the
    gradient of loss - keep_large * sum (w m)^2, by Adam at `gate_lr`. They begin where magnitude's mask is likeliest:
    prior * 0.01 * (what a way shares with it - the mean over ways).

    While gradients are taken the parameter holds w m; it has no gradient of its own, so optimizers leave it alone.
    """

    gate_lr: float
    prior: float = 3.0
    keep_large: float = 1e-5
    tau: tuple[float, float] = (4.0, 0.05)
    kappa: tuple[float, float] = (100.0, 500.0)
    act: ClassVar[Act] = "nothing"

    @torch.no_grad()
    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        numbers["updates"] = 0
        for one in sites:
            weight, pattern = one.parameter.detach(), _nm(one)
            kept = _grouped(one, pattern.choose(one.site.view.to_matrices(weight.abs()))[1].float())
            shared = kept @ ways(pattern).to(weight.device).T
            gate = (shared - shared.mean(2, keepdim=True)).mul_(self.prior * _STD)
            one.tensors |= {"gate": gate, "gate_mean": torch.zeros_like(gate), "gate_square": torch.zeros_like(gate)}
            one.tensors[WHOLE] = weight.clone()
            self._draw(one, 0.0, noise=False)

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        largest = [float(self._draw(one, float(numbers["share"]), noise=True).amax(2).mean()) for one in sites]
        return {"certainty": sum(largest) / max(len(largest), 1)}

    @torch.no_grad()
    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        numbers["updates"] = step = int(numbers["updates"]) + 1
        factor = self._at(self.kappa, float(numbers["share"])) / self._at(self.tau, float(numbers["share"]))
        for one in sites:
            state, weight, masked = one.tensors, one.tensors[WHOLE], one.parameter.detach()
            by_mask = one.gradient * weight - 2 * self.keep_large * weight * masked
            by_way = _grouped(one, one.site.view.to_matrices(by_mask)) @ ways(_nm(one)).to(weight.device).T
            y = state["likely"]
            gradient = (by_way - (y * by_way).sum(2, keepdim=True)).mul_(y).mul_(factor)
            mean = state["gate_mean"].lerp_(gradient, 1 - _BETA1) / (1 - _BETA1**step)
            square = state["gate_square"].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            spread = (square / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            state["gate"].addcdiv_(mean, spread, value=-self.gate_lr)
            one.parameter.grad = None

    def _draw(self, one: Tracked, share: float, noise: bool) -> Tensor:
        """Put w m in the parameter for a new y, which is returned."""
        state, logits = one.tensors, one.tensors["gate"] * self._at(self.kappa, share)
        if noise:
            drawn = torch.empty(logits.shape).exponential_().log_()  # on the CPU: the same on any device
            logits = logits - drawn.to(logits.device)
        state["likely"] = (logits / self._at(self.tau, share)).softmax(2)
        mask = _spread(one, state["likely"] @ ways(_nm(one)).to(logits.device))
        torch.mul(state[WHOLE], mask, out=one.parameter.detach())
        return state["likely"]

    @staticmethod
    def _at(ends: tuple[float, float], share: float) -> float:
        return ends[0] + (ends[1] - ends[0]) * share


def _nm(one: Tracked) -> NM:
    assert isinstance(one.site.pattern, NM)  # Learnable.misfit refuses all others
    return one.site.pattern


def _grouped(one: Tracked, matrices: Tensor) -> Tensor:
    """(batch, rows, cols) in groups: (batch * rows, groups, M), 0 where there is no column."""
    return pad_columns(matrices.float().flatten(0, 1), _nm(one).m, fill=0)


def _spread(one: Tracked, groups: Tensor) -> Tensor:
    """The inverse of `_grouped`, in the parameter's layout."""
    batch, rows, cols = one.site.shape
    return one.site.view.to_parameter(groups.flatten(1)[:, :cols].reshape(batch, rows, cols))
