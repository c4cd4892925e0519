"""The fixed-mask pass: train the weights that a mask keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Once
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class FixedMask(TrainingPass):
    """Train with masks that never change, and leave exact zeros in the weights.

    This is Apex ASP's recipe (Mishra et al., arXiv 2104.08378): prune once, then repeat the training.

    1. A site that is selected, by oneshot or mask, keeps that selection; any other is pruned by magnitude first.
    2. What is masked gets no gradient, and is zero after every step, whatever moments and weight decay would do.
    3. All parameters are trained, the head too; only those with requires_grad False are not.
    State beside Adam's: one byte a weight.
    """

    name: ClassVar[str] = "fixed-mask"
    chooses: ClassVar[bool] = False

    def method(self) -> Method:
        return Method(Once(), Hard())
