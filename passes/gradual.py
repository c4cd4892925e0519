"""The gradual pass: prune more and more while training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.errors import RecipeError
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Cubic
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class Gradual(TrainingPass):
    """Prune by magnitude along a cubic path to the pattern while training, and leave exact zeros in the weights.

    This is gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878) for every pattern but intersections.

    1. Between the shares `start` and `end` of the steps, masks are chosen anew every `every` steps: N:M keeps fewer of
       its M, V:N:M goes through larger and larger M from 4 on, unstructured patterns through lower densities.
    2. What is masked gets no gradient but is not set to zero before `end`, so it can return; from then on it is zero.
    3. A site that is selected before keeps its selection. All parameters are trained, the head too.
    State beside Adam's: one byte a weight, and until `end` the masked copy of the weights in each forward.
    """

    name: ClassVar[str] = "gradual"

    start: float = 0.0
    end: float = 0.6
    every: int = 10

    def method(self) -> Method:
        self.positive("every")
        if not 0 <= self.start < self.end <= 1:
            raise RecipeError(
                f"pass gradual: start is {self.start:g} and end {self.end:g}; expected shares of the steps with "
                "0 <= start < end <= 1"
            )
        return Method(Cubic(self.start, self.end, self.every), Hard())
