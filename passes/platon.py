"""The platon pass: prune more and more by an upper confidence bound of sensitivity; weights can return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.oneshot.scores import Normalise
from sparsec.training import criteria
from sparsec.training.parts import Method, Scope
from sparsec.training.passes import TrainingPass
from sparsec.training.regrowth import Zeroed
from sparsec.training.scored import check, path


@dataclass(frozen=True)
class Platon(TrainingPass):
    """Zero the weights of small or certain sensitivity along a cubic path, and leave exact zeros in the weights.

    This is PLATON (Zhang et al., arXiv 2206.12562).

    1. Sensitivity is the mean of |w g| over a window of `every` steps. A weight's score is its running mean
       (`beta1`) times the running mean of how far it strays from that (`beta2`): what is uncertain is not pruned yet.
    2. Between the shares `start` and `end` of the steps, masks are chosen anew every `every` steps, along the path of
       the gradual pass. What is not chosen is set to zero and trained on: it returns once its score has grown.
    3. From `end` on masks are final. (The paper goes on choosing, at every step.)
    4. scope=global: unstructured sites share one budget (see `training.scope`); N:M and V:N:M keep a fixed number in
       every group. For V:N:M each row's scores are divided by their mean before V rows are summed (`normalise`).
    5. A site that is selected before keeps its selection. All parameters are trained, the head too.
    The paper's beta2 is .85 to .95 by task, its optimizer Adamax; `start` and `end` are its MNLI run's. Its table of
    results was not seen. State beside Adam's: 12 bytes a weight until `end`, then one.
    """

    name: ClassVar[str] = "platon"

    start: float = 0.05
    end: float = 0.7
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.95
    scope: Scope = "global"
    normalise: Normalise = "row"

    def method(self) -> Method:
        check(self.name, self.scope, self.normalise, beta1=self.beta1, beta2=self.beta2)
        schedule = path(self.name, self.start, self.end, self.every)
        criterion = criteria.Platon(self.beta1, self.beta2, self.every, self.normalise)
        return Method(schedule, Zeroed(), criterion, scope=self.scope)
