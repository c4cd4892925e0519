"""The seven-dyn pass: prune more and more by gradients that were large and steady so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.oneshot.scores import Normalise
from sparsec.training.criteria import Seven
from sparsec.training.parts import Method, Scope
from sparsec.training.passes import TrainingPass
from sparsec.training.scored import check, path
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class SevenDyn(TrainingPass):
    """Prune along a cubic path by scores that add up while training, and leave exact zeros in the weights.

    This is SEVEN_dyn (arXiv 2403.12688).

    1. Every step adds |w g| m / sqrt(v), m and v the running means of |g| and g^2 (`beta1`, `beta2`).
    2. Between the shares `start` and `end` of the steps, masks are chosen anew every `every` steps, along the path of
       the gradual pass. What is pruned does not return; only V:N:M, whose blocks grow on the path, may take weights
       back where a block has fewer left than it keeps.
    3. scope=global: unstructured sites share one budget (see `training.scope`); N:M and V:N:M keep a fixed number in
       every group. For V:N:M each row's scores are divided by their mean before V rows are summed (`normalise`):
       without that a row of large scores picks the columns of all.
    4. A site that is selected before keeps its selection. All parameters are trained, the head too.
    Different from the paper's code: it sets `start` and `end` for each task (about .05 to .2 of the steps for the large
    ones), chooses masks at every step, trains at a constant rate, and takes the weights after the optimizer's step.
    State beside Adam's: 13 bytes a weight until `end`, then one.
    """

    name: ClassVar[str] = "seven-dyn"

    start: float = 0.05
    end: float = 0.25
    every: int = 10
    beta1: float = 0.8
    beta2: float = 0.9
    scope: Scope = "global"
    normalise: Normalise = "row"

    def method(self) -> Method:
        check(self.name, self.scope, self.normalise, beta1=self.beta1, beta2=self.beta2)
        criterion = Seven(self.beta1, self.beta2, self.normalise)
        schedule = path(self.name, self.start, self.end, self.every)
        return Method(schedule, Hard(), criterion, scope=self.scope)
