"""The seven-pre pass: score weights by the gradients of a few batches, prune, then train what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

from sparsec.oneshot.scores import Normalise
from sparsec.training.batches import Batches
from sparsec.training.criteria import Seven
from sparsec.training.engine import Engine
from sparsec.training.model import LOSS, GraphModel
from sparsec.training.parts import Method, Scope
from sparsec.training.passes import TrainingPass
from sparsec.training.schedules import Once
from sparsec.training.scored import check
from sparsec.training.updates import Hard


@dataclass(frozen=True)
class SevenPre(TrainingPass):
    """Prune by the gradients of the model that is given, train under that mask, and leave exact zeros in the weights.

    This is SEVEN_pre (arXiv 2403.12688): weights of large and steady gradients are kept.

    1. Before training, `score_batches` batches of the training data, in the seed's order, add |w g| m / sqrt(v) each,
       m and v the running means of |g| and g^2 (`beta1`, `beta2`). Nothing is trained and no dropout is drawn.
    2. Then it is the fixed-mask pass. scope=global: unstructured sites share one budget (see `training.scope`); N:M
       and V:N:M keep a fixed number in every group.
    3. For V:N:M each row's scores are divided by their mean before V rows are summed (`normalise`).
    4. A site that is selected before keeps its selection. All parameters are trained, the head too.
    Not established: how many batches the paper takes, and whether in its own order; its code for this variant is not
    public. State beside Adam's: while scoring 12 bytes a weight, then one.
    """

    name: ClassVar[str] = "seven-pre"

    score_batches: int = 32
    beta1: float = 0.8
    beta2: float = 0.9
    scope: Scope = "global"
    normalise: Normalise = "row"

    def method(self) -> Method:
        self.positive("score_batches")
        check(self.name, self.scope, self.normalise, beta1=self.beta1, beta2=self.beta2)
        return Method(Once(), Hard(), Seven(self.beta1, self.beta2, self.normalise), scope=self.scope)

    def prepare(self, engine: Engine, model: GraphModel, batches: Batches, seed: int) -> GraphModel:
        assert model.objective is not None
        device, left = next(model.parameters()).device, self.score_batches
        for epoch in count():
            for batch in batches.epoch(seed, epoch)[:left]:
                there = {name: value.to(device) for name, value in batch.items()}
                model.with_loss(there, model.objective.counts([batch]))[LOSS].backward()
                engine.observe()
                model.zero_grad()
                left -= 1
            if not left:
                break
        return model
