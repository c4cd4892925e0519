"""Mask training: a real number for every weight is trained, its score, and the largest of them say what is kept.

Weights stay as they are. In the graph a mask is a step function of the scores; training takes it for the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.pattern import NM, Pattern, SharedColumns, Unstructured
from sparsec.sites import Site
from sparsec.training.engine import Engine
from sparsec.training.model import GraphModel
from sparsec.training.parts import Act, Clock, Project, Tracked
from sparsec.training.schedules import thinned

Init = Literal["soft", "hard"]
_KEPT = 0.02  # score of what `hard` keeps: the paper's alpha phi, 2 * .01
_SHAKEN, _MOST_TIED = 1e-4, 0.1  # |w| are tied where such a share of their mean tells no more; the most of what is kept
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # of Adam


@dataclass(frozen=True)
class Path:
    """Density falls from `start_density` to the pattern's, d + (d0 - d) (1 - t)^3, while scores are trained.

    t goes from 0 at `start_step` to 1 at the share `end` of the steps. Patterns that keep no less than `start_density`
    hold from the first mask on. Before `start_step` nothing is left out. Masks are final with the last step.
    """

    start_density: float
    end: float
    every: int = 1
    start_step: int = 0
    init: Init = "soft"

    def check(self, clock: Clock) -> None:
        last = round(self.end * clock.steps) if self.start_density else clock.steps
        if last - self.start_step < self.every:
            until = f"{last} (end={self.end:g})" if self.start_density else "the last"
            raise UsageError(
                f"masks cannot be trained: of {clock.steps} steps, scores begin with start_step={self.start_step}, "
                f"must be at their pattern's density by step {until}, and masks follow every {self.every}; train "
                "longer, or set start_step or every lower"
            )

    def misfit(self, pattern: Pattern) -> str | None:
        if not isinstance(pattern, (NM, SharedColumns, Unstructured)):
            return f"mask-training is defined for N:M, V:N:M and unstructured patterns, found {pattern}"
        if self.init == "hard" and pattern.density < self.start_density:
            return (
                "init=hard gives all kept weights one score: too many ties for a path, which would choose among them "
                f"by their place; found start_density {self.start_density:g} and {pattern}, whose density is "
                f"{pattern.density:g}; use init=soft, or start_density=0 for one density from the first step on"
            )
        return None

    def fires(self, clock: Clock, epoch_ends: bool) -> bool:
        since = clock.step - self.start_step
        return not epoch_ends and since >= 0 and since % self.every == 0

    def frozen_from(self, clock: Clock) -> int:
        return clock.steps

    def pattern(self, site: Site, clock: Clock) -> Pattern | None:
        target = site.pattern
        assert target is not None
        if clock.step < self.start_step:
            return None
        done = min((clock.step - self.start_step) / max(round(self.end * clock.steps) - self.start_step, 1), 1.0)
        above = self.start_density - target.density
        return thinned(target, target.density + above * (1 - done) ** 3) if above > 0 and done < 1 else target


@dataclass(frozen=True)
class Learnt:
    """The trained scores, counted from a site's least one; before there are any, |w|.

    Under V:N:M a column's score is the sum of its V scores (`l1`), which counting from the least one ranks alike.
    """

    def observe(self, one: Tracked) -> None:
        """The update sees the gradients."""

    def score(self, one: Tracked, weight: Tensor) -> Tensor:
        score = one.tensors.get("score")
        return weight.abs() if score is None else score - score.amin()


@dataclass(frozen=True)
class Scores:
    """Mask training (arXiv 2210.05211): dL/dscore = dL/dw' w, w' the masked weight, and Adam steps the score.

    The rate falls linearly from `lr` to 0. A trained weight has no gradient of its own, so optimizers leave it alone,
    weight decay too; before `start_step` it is trained as it is without a mask.

    soft: a score begins as |w|. hard: as .02 where magnitude keeps a weight, else 0; UsageError for a matrix where
    more than a tenth of what is kept is kept for its place, as other weights are as large.
    """

    lr: float
    init: Init = "soft"
    start_step: int = 0
    act: ClassVar[Act] = "through"

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        if not self.start_step:
            self._start(sites, project, numbers)

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        if "updates" not in numbers:
            self._start(sites, project, numbers)
        kept = changed = 0
        for one in sites:
            mask = project(one, one.parameter.detach())
            changed += int((mask ^ one.tensors["mask"]).count_nonzero())
            kept += int(mask.count_nonzero())
            one.tensors["mask"] = mask
        total = max(sum(one.parameter.numel() for one in sites), 1)
        return {"density": kept / total, "changed": changed / total}

    @torch.no_grad()
    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        if "updates" not in numbers:
            return
        numbers["updates"] = step = int(numbers["updates"]) + 1
        rate = self.lr * (1 - float(numbers["share"])) / (1 - float(numbers["begun"]))
        for one in sites:
            state, gradient = one.tensors, (one.gradient * one.parameter.detach()).float()
            mean = state["score_mean"].lerp_(gradient, 1 - _BETA1) / (1 - _BETA1**step)
            square = state["score_square"].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
            spread = (square / (1 - _BETA2**step)).sqrt_().add_(_EPSILON)
            state["score"].addcdiv_(mean, spread, value=-rate)
            one.parameter.grad = None

    @torch.no_grad()
    def _start(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        numbers |= {"updates": 0, "begun": numbers["share"]}
        for one in sites:
            weight = one.parameter.detach()
            mask = project(one, weight)
            if self.init == "hard":
                _refuse_ties(one, mask, project)
            score = mask.float() * _KEPT if self.init == "hard" else weight.abs().float()
            one.tensors |= {
                "mask": mask,
                "score": score,
                "score_mean": torch.zeros_like(score),
                "score_square": torch.zeros_like(score),
            }


def _refuse_ties(one: Tracked, mask: Tensor, project: Project) -> None:
    """Raise UsageError where a little noise on |w| exchanges much of what the mask keeps."""
    size = one.parameter.detach().abs().float()
    noise = torch.rand(size.shape, generator=torch.Generator().manual_seed(0)).to(size.device)
    tied = float((mask & ~project(one, size + _SHAKEN * size.mean() * noise)).sum() / mask.sum())
    if tied > _MOST_TIED:
        raise UsageError(
            f"{one.site.name}: init=hard keeps the largest weights, but {tied:.0%} of what it would keep is no larger "
            f"than weights that it would drop; expected at most {_MOST_TIED:.0%}. Weights that are zero already, or "
            "of few values, have no order: start from the weights before they were pruned or rounded, or keep more"
        )


class MasksOnly(GraphModel):
    """A model of which nothing but free sites, whose scores are trained, has gradients from `start_step` on.

    Outside of training every parameter wants gradients again if it did before.
    """

    def __init__(self, model: GraphModel, engine: Engine, start_step: int) -> None:
        free = {id(one.parameter) for one in engine.sites if one.selection is None}
        self._rest = [p for p in model.parameters() if p.requires_grad and id(p) not in free]
        self._engine, self._start_step = [engine], start_step
        super().__init__(model._program[0], model.objective, model._teacher[0] if model._teacher else None)

    def train(self, mode: bool = True) -> MasksOnly:
        if not mode:
            self._want(True)
        super().train(mode)
        return self

    def with_loss(self, batch: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Tensor]:
        self._want(not self.training or self._engine[0].clock.step < self._start_step)
        return super().with_loss(batch, counts)

    def _want(self, gradients: bool) -> None:
        for parameter in self._rest:
            parameter.requires_grad_(gradients)
