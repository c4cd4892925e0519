"""The three-stage-lora pass: train low-rank changes while the pattern is chosen and after it, merged exactly sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sparsec.errors import RecipeError
from sparsec.training import adapters
from sparsec.training.batches import Batches
from sparsec.training.engine import Engine
from sparsec.training.lora import MaskedLora, Relative, Stages
from sparsec.training.model import GraphModel
from sparsec.training.parts import Magnitude, Method
from sparsec.training.passes import TrainingPass

LoraScore = Literal["relative", "magnitude"]


@dataclass(frozen=True)
class ThreeStageLora(TrainingPass):
    """Train W + BA, prune it on the way, and leave exact zeros in the weights and no adapter.

    This is the low-rank training of the V:N:M paper ("Beyond 2:4: Exploring V:N:M Sparsity for Efficient Transformer
    Inference on GPUs", arXiv 2410.16135). The model computes with where(mask, W + alpha / rank BA, 0); W is frozen.

    1. For `stage1` of the steps nothing is masked. For `stage2`, every `every` steps, BA is merged into W, masks are
       chosen anew of all weights (so what is masked can return), and A and B begin anew. Then masks stay.
    2. `score` says what masks keep: relative, |w| over the sums of its row and column, or magnitude. V:N:M blocks
       keep the columns of the largest sums. Strips and intersections are refused.
    3. A and B are trained by Adam at `adapter_lr`, falling linearly to 0, without weight decay. All other parameters
       are trained with `lr`, biases, norms and the head; for the adapters alone, give them requires_grad False.
    4. `adapter`, a folder that peft wrote, is merged before: training goes on from W + scale BA. A site selected before
       keeps its selection and its zeros, and is trained in full under it; where all are, an adapter is needed.
    5. At the end BA is merged: the weights are what the model computed with.
    Not established: the paper's rank, rates and stage lengths, but that stages 1 and 2 take at most 10 % of the steps,
    which is the default; and whether it merges what is masked too. Its RIA also weighs inputs' norms, which `relative`
    leaves out. State for a site of R x C weights: 5 bytes a weight (4 in stage 1) and 12 rank (R + C) bytes, but none
    of Adam's 8 a weight.
    """

    name: ClassVar[str] = "three-stage-lora"
    chooses: ClassVar[bool] = False  # with an adapter there is something to do; see `prepare`

    rank: int = 16
    alpha: float = 32.0
    adapter_lr: float = 2e-4
    stage1: float = 0.05
    stage2: float = 0.05
    every: int = 5
    score: LoraScore = "relative"
    adapter: str = ""

    def method(self) -> Method:
        self.positive("rank", "alpha", "adapter_lr", "every")
        if not (0 <= self.stage1 and 0 <= self.stage2 and self.stage1 + self.stage2 < 1):
            raise RecipeError(
                f"pass three-stage-lora: stage1 is {self.stage1:g} and stage2 {self.stage2:g}; expected shares of the "
                "steps, 0 or more, whose sum is below 1"
            )
        if self.score not in get_args(LoraScore):
            raise RecipeError(f"pass three-stage-lora: score is {self.score!r}; expected relative or magnitude")
        stages = Stages(self.stage1, self.stage2, self.every)
        criterion = Relative() if self.score == "relative" else Magnitude()
        return Method(stages, MaskedLora(self.adapter_lr, stages, self.rank, self.alpha), criterion, columns="l1")

    def prepare(self, engine: Engine, model: GraphModel, batches: Batches, seed: int) -> GraphModel:
        if not self.adapter and all(one.selection is not None for one in engine.sites):
            raise RecipeError(
                "every site is selected already, so three-stage-lora has no weights to choose and no adapter to merge; "
                "leave out what selects them before it, give adapter=FOLDER, or train with fixed-mask"
            )
        if self.adapter:
            adapters.merge(engine.program, adapters.read(self.adapter))
        engine.numbers["seed"] = seed
        return model
