"""Criteria that watch gradients while training: SEVEN, PLATON and movement. Their state is float32, one value a weight.

1. They see a step's complete gradient, before clipping where the loop allows it, and the weights it was taken at.
2. Sums of gradients span decades: among V rows that share columns one would choose for all. So for V:N:M and strips
   each row's scores are made comparable first (`Normalise`); other patterns rank scores as they are.
3. Scores are differences of rank only; nothing but their order inside a matrix, group or budget counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.oneshot.scores import Normalise, normalised
from sparsec.pattern import SharedColumns
from sparsec.training.parts import Tracked

_ALIVE = 1e-30  # the least score of a weight that may stay: one without gradients comes before one that is pruned


@dataclass(frozen=True)
class Seven:
    """SEVEN (arXiv 2403.12688): I += |w g| m / sqrt(v), m and v the bias-corrected running means of |g| and g^2.

    What the mask leaves out scores 0, below all that is left: it does not return, except in a block of V:N:M or a
    strip that has fewer weights left than it keeps.
    """

    beta1: float = 0.8
    beta2: float = 0.9
    normalise: Normalise = "row"

    def observe(self, one: Tracked) -> None:
        if "importance" not in one.tensors:
            one.tensors |= {name: _zeros(one) for name in ("importance", "first", "second")}
        step, state = _count(one), one.tensors
        size = one.gradient.abs().float()
        mean = state["first"].mul_(self.beta1).add_(size, alpha=1 - self.beta1) / (1 - self.beta1**step)
        square = state["second"].mul_(self.beta2).addcmul_(size, size, value=1 - self.beta2)
        spread = (square / (1 - self.beta2**step)).sqrt_().add_(1e-9)
        state["importance"].addcmul_(size.mul_(one.parameter.detach().abs()), mean.div_(spread))

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        score = comparable(one, _found(one, "importance"), self.normalise)
        mask = one.tensors.get("mask")
        return score if mask is None else torch.where(mask, score.clamp(min=_ALIVE), 0.0)


@dataclass(frozen=True)
class Platon:
    """PLATON (arXiv 2206.12562): A U, an upper confidence bound of sensitivity.

    Every `window` steps, with I the window's mean of |w g|: A = beta1 A + (1 - beta1) I and
    U = beta2 U + (1 - beta2) |I - A|. Before the first window is full, what is there of it counts.
    """

    beta1: float = 0.85
    beta2: float = 0.95
    window: int = 10
    normalise: Normalise = "row"

    def observe(self, one: Tracked) -> None:
        if "sensitivity" not in one.tensors:
            one.tensors |= {name: _zeros(one) for name in ("sensitivity", "average", "uncertainty")}
        step, state = _count(one), one.tensors
        part = (one.parameter.detach() * one.gradient).abs_()
        mean = state["sensitivity"].add_(part, alpha=1 / self.window)
        if step % self.window == 0:
            average = state["average"].mul_(self.beta1).add_(mean, alpha=1 - self.beta1)
            state["uncertainty"].mul_(self.beta2).add_((mean - average).abs_(), alpha=1 - self.beta2)
            mean.zero_()

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        begun = _found(one, "sensitivity")
        full = int(one.tensors["seen"]) >= self.window
        score = one.tensors["average"] * one.tensors["uncertainty"] if full else begun
        return comparable(one, score, self.normalise)


@dataclass(frozen=True)
class Movement:
    """Movement pruning (arXiv 2005.07683): S -= w g, g the gradient of the masked weight; those that grow are kept.

    Scores may be negative, so each site's are counted from its least one.
    """

    normalise: Normalise = "rank"

    def observe(self, one: Tracked) -> None:
        if "movement" not in one.tensors:
            one.tensors["movement"] = _zeros(one)
        one.tensors["movement"].addcmul_(one.parameter.detach(), one.gradient, value=-1)

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        movement = _found(one, "movement")
        return comparable(one, movement - movement.amin(), self.normalise)


def comparable(one: Tracked, score: Tensor, how: Normalise) -> Tensor:
    """Rule 2: a site's scores, in the parameter's layout; the same ones where rows share no columns."""
    assert one.site.pattern is not None
    if not isinstance(one.site.pattern.executable, SharedColumns):
        return score
    return one.site.view.to_parameter(normalised(one.site.view.to_matrices(score), how))


def _zeros(one: Tracked) -> Tensor:
    return torch.zeros_like(one.parameter.detach(), dtype=torch.float32)


def _count(one: Tracked) -> int:
    """Which gradient this is, the first is 1; kept with the state, so that it goes on where training does."""
    seen = one.tensors.get("seen")
    one.tensors["seen"] = torch.ones((), dtype=torch.int64) if seen is None else seen + 1
    return int(one.tensors["seen"])


def _found(one: Tracked, name: str) -> Tensor:
    if name not in one.tensors:
        raise UsageError(
            f"{one.site.name} cannot be pruned yet: its scores are made of gradients, and none was seen; train at "
            "least one step before masks are chosen (for a mask before the first step use the pass seven-pre)"
        )
    return one.tensors[name]
