"""The movement pass: prune more and more of the weights that training moves towards zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.oneshot.scores import Normalise
from sparsec.training import criteria
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.regrowth import Scored
from sparsec.training.scored import check, path


@dataclass(frozen=True)
class Movement(TrainingPass):
    """Keep the weights that grow, prune along a cubic path those that shrink, and leave exact zeros in the weights.

    This is hard movement pruning (Sanh et al., arXiv 2005.07683).

    1. Every step subtracts w g from a weight's score, g the gradient of the masked weight, which masked ones have too:
       so they can return. The optimizer trains what is kept.
    2. Between the shares `start` and `end` of the steps, masks are chosen anew every `every` steps, along the path of
       the gradual pass. Each matrix has its own budget, as in the paper.
    3. For V:N:M each row's scores are replaced by their ranks before V rows are summed (`normalise`): they can be
       negative, and a sum of them would follow a few rows.
    4. A site that is selected before keeps its selection. All parameters are trained, the head too.
    Different from the paper's code: scores are sums, where it trains them by Adam at a rate of their own, and masks
    move every `every` steps instead of all. Soft movement pruning is not here: its sparsity follows from a threshold,
    so no pattern could be promised. State beside Adam's: 5 bytes a weight until `end`, then one; and the masked copy
    of the weights in each forward.
    """

    name: ClassVar[str] = "movement"

    start: float = 0.1
    end: float = 0.8
    every: int = 10
    normalise: Normalise = "rank"

    def method(self) -> Method:
        check(self.name, normalise=self.normalise)
        return Method(path(self.name, self.start, self.end, self.every), Scored(), criteria.Movement(self.normalise))
