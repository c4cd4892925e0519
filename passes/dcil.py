"""The dcil pass: train pruned and unpruned weights side by side, each by its own forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.errors import RecipeError
from sparsec.training.batches import Batches
from sparsec.training.dual import Dual, DualModel
from sparsec.training.engine import Engine
from sparsec.training.losses import Distillation
from sparsec.training.model import GraphModel
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Repeated


@dataclass(frozen=True)
class Dcil(TrainingPass):
    """Train kept weights through the pruned model and masked ones through the dense one, and leave exact zeros.

    This is dynamic collective intelligence learning (Kim et al., arXiv 2109.04660).

    1. Each step computes twice, so it takes about twice as long: with masked weights, whose gradient what is kept
       gets, and with all weights, whose gradient what is masked gets. The losses of both are added up.
    2. `mutual` times the distance of their outputs is added for each side (T^2 KL of logits, `temperature`; the mean
       square of other outputs, `hidden`); neither side is trained by being the teacher.
    3. Masks are chosen anew by magnitude every `every` steps, so what is masked can return.
    4. At the end, or before `frozen_epochs`, masks are final; the last epochs train what is left, with one forward.
    5. A site that is selected before keeps its selection. All parameters are trained, the head by both forwards.
    Not established (only the abstract was read): how the paper weighs the terms, when its masks move and along which
    path it prunes: 1, 10 and none are ours. State beside Adam's: one byte a weight, and what two forwards take.
    """

    name: ClassVar[str] = "dcil"

    mutual: float = 1.0
    every: int = 10
    frozen_epochs: int = 0

    def method(self) -> Method:
        self.positive("every")
        if not 0 <= self.mutual < float("inf"):
            raise RecipeError(f"pass dcil: mutual is {self.mutual:g}; expected 0 or more")
        if not 0 <= self.frozen_epochs < self.epochs:
            raise RecipeError(
                f"pass dcil: frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs; expected 0 or more, and at "
                "least one epoch that is not frozen"
            )
        return Method(Repeated(self.every, self.frozen_epochs), Dual())

    def prepare(self, engine: Engine, model: GraphModel, batches: Batches, seed: int) -> GraphModel:
        return DualModel(model, engine, Distillation(self.mutual, self.temperature, self.hidden))
