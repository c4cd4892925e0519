"""The mask-training pass: train what is kept, by a score for every weight, and leave the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sparsec.errors import RecipeError
from sparsec.training.batches import Batches
from sparsec.training.engine import Engine
from sparsec.training.model import GraphModel
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.score_masks import Init, Learnt, MasksOnly, Path, Scores

Rest = Literal["frozen", "trained"]


@dataclass(frozen=True)
class MaskTraining(TrainingPass):
    """Train a real score for every weight, keep the weights of the largest, unchanged, and leave exact zeros.

    This is the mask training of Liu et al., "A Win-win Deal: Towards Sparse and Robust Pre-trained Language Models",
    arXiv 2210.05211. With loss=poe, reweight or confreg it looks for subnetworks that do not rely on a known bias.

    1. The model computes with w' = where(mask, w, 0); scores get dL/dw' w, as if the mask were the score itself, and
       Adam steps them at `score_lr`, which falls linearly to 0. Weights are not trained, weight decay is not theirs.
    2. init=soft: scores begin as |w|. init=hard: as .02 for what magnitude keeps, else 0. Where that is not decided by
       magnitude (more than a tenth of what is kept is tied with what is not) it is refused, and so is hard with a path.
    3. Each matrix has its own budget, met exactly after every `every` steps. It falls along a cubic path from
       `start_density` to the pattern's density at the share `end` of the steps. Patterns that keep no less than
       `start_density` (2:4 does by default), or start_density=0: the pattern holds from the first mask on. What is
       evaluated on the way has the pattern.
    4. V:N:M: a block keeps the four columns of the largest sums of scores, then each row as 2:M. Strips alike.
    5. rest=frozen: no other parameter is trained, the head neither, so it must have been trained before. trained:
       all others are, with `lr`.
    6. start_step=k: the first k steps train the whole dense model, as without a pattern; scores begin with its weights
       then. (The paper looks for masks from checkpoints on the way of fine-tuning: when it starts matters.)
    7. A site that is selected before keeps its selection, and is one of the rest. To train what is left, put
       fixed-mask behind this pass.
    Different from the paper's code: it moves each matrix's threshold every 500 or 1000 steps and lets the budget drift
    in between; here masks are exact at any time. Its rates rise first for some .05 of the steps. Gradients are clipped
    by the norm of those of the weights. The paper has neither N:M nor V:N:M.
    Not established: where its path ends, so `end` is ours; it picks checkpoints only after .7 of the steps. `score_lr`
    is its rate for MNLI, in some 60000 steps: a score moves by about the rate in each, so some hundred steps need a
    rate such as 3e-4 for 90 % zeros and 1e-4 for 50 %; 1e-3 ended worse than magnitude, or in guessing
    (docs/results/training.md, accuracy.md). State: 13 bytes a weight and none of Adam's 8, and the masked copy of the
    weights in each forward; at the end one byte.
    """

    name: ClassVar[str] = "mask-training"

    score_lr: float = 5e-5
    init: Init = "soft"
    start_density: float = 0.3
    end: float = 0.7
    every: int = 1
    start_step: int = 0
    rest: Rest = "frozen"

    def method(self) -> Method:
        self.positive("score_lr", "every")
        for name, words in (("init", get_args(Init)), ("rest", get_args(Rest))):
            if getattr(self, name) not in words:
                raise RecipeError(
                    f"pass mask-training: {name} is {getattr(self, name)!r}; expected {' or '.join(words)}"
                )
        if not 0 <= self.start_density < 1:
            raise RecipeError(
                f"pass mask-training: start_density is {self.start_density:g}; expected the share of weights that the "
                "first masks keep, below 1, or 0 for that of the pattern"
            )
        if not 0 < self.end <= 1:
            raise RecipeError(
                f"pass mask-training: end is {self.end:g}; expected a share of the steps, above 0 and at most 1"
            )
        if self.start_step < 0:
            raise RecipeError(f"pass mask-training: start_step is {self.start_step}; expected 0 or more")
        schedule = Path(self.start_density, self.end, self.every, self.start_step, self.init)
        return Method(schedule, Scores(self.score_lr, self.init, self.start_step), Learnt(), columns="l1")

    def prepare(self, engine: Engine, model: GraphModel, batches: Batches, seed: int) -> GraphModel:
        return MasksOnly(model, engine, self.start_step) if self.rest == "frozen" else model
