"""DCIL: every step computes with the pruned weights and with all of them, and each teaches the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from sparsec.program import bind
from sparsec.training.engine import Engine
from sparsec.training.losses import (
    LOGITS,
    CrossEntropy,
    Distillation,
    MeanSquare,
    NextToken,
    Objective,
    Outputs,
    main_name,
)
from sparsec.training.masks import name_of
from sparsec.training.model import LOSS, GraphModel
from sparsec.training.parts import Project, Tracked
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class Dual(Hard):
    """Masks of the weights now, from the first step on. `DualModel` gives what they leave out its gradient."""

    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        self.choose(sites, project, numbers)


class DualModel(GraphModel):
    """A model whose loss in training is that of two forwards, until masks are final.

    1. The first computes with masked weights: its gradient reaches what is kept.
    2. The second computes with all weights: its gradient reaches what is masked, instead of the first one's guess.
    3. `mutual` draws the outputs of each to those of the other, which are not trained by that.
    Parameters that are no sites have the gradient of both.
    """

    def __init__(self, model: GraphModel, engine: Engine, mutual: Distillation) -> None:
        assert model.objective is not None
        self._own = model.objective
        program, teacher = model._program[0], model._teacher[0] if model._teacher else None
        super().__init__(program, model.objective, teacher)
        self.objective = Objective((*model.objective.terms, mutual))  # so that loops count what it is divided by
        self._mutual, self._engine = mutual, [engine]

    def with_loss(self, batch: dict[str, Tensor], counts: tuple[int, ...]) -> dict[str, Tensor]:
        taught, outputs = self._taught(batch), self.outputs(batch)
        loss = self._own.loss(outputs, batch, taught, counts[:-1])
        if self.training and not self._engine[0].frozen:
            dense = self._dense(batch)
            both = self._drawn(outputs, dense, batch) + self._drawn(dense, outputs, batch)
            loss = loss + self._own.loss(dense, batch, taught, counts[:-1]) + both / counts[-1]
        return {LOSS: loss, **outputs}

    def _dense(self, batch: dict[str, Tensor]) -> Outputs:
        """The outputs with all weights (rule 2)."""
        replaced: dict[str, Tensor] = {}
        for one in self._engine[0].sites:
            if one.selection is None:
                mask = one.tensors["mask"]
                replaced[one.site.name] = torch.where(mask, one.parameter.detach(), one.parameter)
                replaced[name_of(one.site)] = torch.ones_like(mask)
        inputs = {name: value for name, value in batch.items() if name in self.names}
        found: Outputs = functional_call(self.graph, replaced, tuple(bind(self.names, (), inputs)))
        return found

    def _drawn(self, outputs: Outputs, to: Outputs, batch: dict[str, Tensor]) -> Tensor:
        fixed = {name: value.detach() for name, value in to.items()}
        kinds = {type(term) for term in self._own.terms}
        logits = main_name(outputs) if kinds & {CrossEntropy, NextToken} else "" if MeanSquare in kinds else LOGITS
        return self._mutual.weight * replace(self._mutual, logits=logits).sum(outputs, batch, fixed)
