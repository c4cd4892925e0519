"""The admm pass: train weights towards a pattern, then project them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsec.errors import RecipeError
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Repeated
from sparsec.training.updates import Penalty


@dataclass(frozen=True)
class Admm(TrainingPass):
    """Train with a pull towards the pattern that grows where it is resisted, and leave exact zeros in the weights.

    This is NxMTransformer (Holmes et al., arXiv 2110.15766) for every pattern. It starts from a model that is already
    fine-tuned on its task.

    1. Each step adds rho (W - Z + U) to the gradient, after clipping, whatever the accumulation.
    2. Each epoch, or every `every` steps, Z is W + U projected on the pattern (Euclidean) and U grows by W - Z.
    3. At the end, or before `frozen_epochs`, W is projected once for all; the last epochs train what is left.
    4. A site that is selected before keeps its selection. All parameters are trained, the head too.
    Curves in the report: primal |W - Z| / |W| and dual rho |Z - Z before| / |W|. State beside Adam's: Z - U in float32
    and a mask, 5 bytes a weight; from the final projection on, one byte.
    """

    name: ClassVar[str] = "admm"

    epochs: int = 10
    rho: float = 1e-3
    """Strength of the pull; the paper tries 1e-3, 4e-3 and 1e-2."""
    balance: Literal["constant", "balanced"] = "constant"
    """balanced: rho is doubled or halved where one residual is ten times the other."""
    every: int = 0
    """Steps between dual updates; 0: one an epoch."""
    frozen_epochs: int = 0

    def method(self) -> Method:
        self.positive("rho")
        if self.balance not in ("constant", "balanced"):
            raise RecipeError(f"pass admm: balance is {self.balance!r}; expected constant or balanced")
        if self.every < 0 or not 0 <= self.frozen_epochs < self.epochs:
            raise RecipeError(
                f"pass admm: every is {self.every} and frozen_epochs {self.frozen_epochs} of {self.epochs} epochs; "
                "expected 0 or more, and at least one epoch that is not frozen"
            )
        return Method(Repeated(self.every, self.frozen_epochs), Penalty(self.rho, self.balance))
