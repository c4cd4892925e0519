"""The s-ste pass: train dense weights through a soft threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.errors import RecipeError
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.soft import EveryStep, SoftThreshold


@dataclass(frozen=True)
class SSte(TrainingPass):
    """Compute with weights shrunk to the pattern, train the weights behind them, and leave exact zeros in the weights.

    This is S-STE (Hu et al., arXiv 2409.09099). What is left out at the end differs from other passes: kept weights
    are the shrunk ones, times a factor.

    1. The model computes with beta S(W), S(w) = sign(w) max(|w| - t, 0), t the largest |w| of a group that is not
       kept. So a weight is zero when it leaves or enters, and nothing jumps. W gets the gradient of beta S(W).
    2. beta = <W, S(W)> / <S(W), S(W)>, one a site, taken before the first step and fixed.
    3. V:N:M, which the paper does not have: each block's columns are shrunk by the length of the fifth longest, then
       each row as for 2:M. Unstructured: one threshold a matrix. Strips and intersections are refused: their groups
       are chosen, so no threshold moves continuously.
    4. At the end, or before `frozen_epochs`, W becomes beta S(W); the last epochs train what is left.
    5. A site that is selected before keeps its selection. All parameters are trained, the head too.
    The paper is about pretraining, with 8-bit products and sampled gradients (MVUE), which are not here. State beside
    Adam's: 5 bytes a weight, then one.
    """

    name: ClassVar[str] = "s-ste"

    frozen_epochs: int = 0

    def method(self) -> Method:
        if not 0 <= self.frozen_epochs < self.epochs:
            raise RecipeError(
                f"pass s-ste: frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs; expected 0 or more, and "
                "at least one epoch that is not frozen"
            )
        return Method(EveryStep(frozen_epochs=self.frozen_epochs), SoftThreshold())
