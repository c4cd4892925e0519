"""The sr-ste pass: train dense weights through their masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.errors import RecipeError
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Repeated
from sparsec.training.updates import StraightThrough


@dataclass(frozen=True)
class SrSte(TrainingPass):
    """Compute with masked weights but train all of them, and leave exact zeros in the weights.

    This is SR-STE (Zhou et al., "Learning N:M fine-grained structured sparse neural networks", arXiv 2102.04010).

    1. The gradient of the masked weight goes to the dense one, plus decay (1 - mask) W, after clipping.
    2. Masks are chosen anew every `every` steps, from the dense weights; the paper does so in every step (1).
    3. At the end, or before `frozen_epochs`, masks are final; the last epochs train what is left.
    4. A site that is selected before keeps its selection. All parameters are trained, the head too.
    State beside Adam's: one byte a weight, and the masked copy of the weights in each forward.
    """

    name: ClassVar[str] = "sr-ste"

    decay: float = 2e-4
    """Of masked weights, the paper's lambda."""
    every: int = 10
    frozen_epochs: int = 0

    def method(self) -> Method:
        if not 0 <= self.decay < float("inf"):
            raise RecipeError(f"pass sr-ste: decay is {self.decay:g}; expected 0 or more")
        self.positive("every")
        if not 0 <= self.frozen_epochs < self.epochs:
            raise RecipeError(
                f"pass sr-ste: frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs; expected 0 or more, and "
                "at least one epoch that is not frozen"
            )
        return Method(Repeated(self.every, self.frozen_epochs), StraightThrough(self.decay))
