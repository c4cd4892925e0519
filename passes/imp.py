"""The imp pass: iterative magnitude pruning, with and without rewinding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from sparsec.errors import RecipeError
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass
from sparsec.training.rounds import Left, Rounds
from sparsec.training.updates import Hard

Rewind = Literal["none", "initial"]


@dataclass(frozen=True)
class Imp(TrainingPass):
    """Train, prune the smallest weights, train what is left, and so on; leave the pattern's exact zeros in the weights.

    This is iterative magnitude pruning (Frankle and Carbin, arXiv 1803.03635), with the rounds of Liu et al., "A
    Win-win Deal: Towards Sparse and Robust Pre-trained Language Models", arXiv 2210.05211.

    1. After every share `every` of the steps each matrix loses another `step` of all its weights, those that are
       smallest now; what is pruned never returns. At the pattern's density it stops, and the rest of the steps trains
       what is left: 70 % sparsity leaves .3 of the steps, 90 % .1; for more set `every` lower.
    2. N:M keeps fewer and fewer of its M (2:4 goes through 3:4); rounds between which it cannot are one. V:N:M, strips
       and intersections are pruned once, when their density is due: blocks of one M do not lie inside those of another.
    3. When something was pruned, training begins anew: moments are zero, and the rate rises (`warmup`) and falls
       linearly to 0 within each round.
    4. rewind=initial: all parameters and statistics, the head's too, are then what they were when the pass began, but
       for what is pruned. So the last round trains, alone, a subnetwork of the weights that were given.
    5. A site that is selected before keeps its selection. All parameters are trained, the head too.
    Not established: whether the paper's rate begins anew as its optimizer does. Frankle and Carbin prune 20 % of what
    is left after each of several complete trainings: for that raise `epochs`. State beside Adam's: one byte a weight,
    the masked copy of the weights in each forward, and with rewind=initial 4 bytes for every parameter of the model.
    """

    name: ClassVar[str] = "imp"

    step: float = 0.1
    every: float = 0.1
    rewind: Rewind = "none"

    def method(self) -> Method:
        for name in ("step", "every"):
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(
                    f"pass imp: {name} is {getattr(self, name):g}; expected a share above 0 and below 1, of the "
                    f"{'weights' if name == 'step' else 'steps'}"
                )
        if self.rewind not in get_args(Rewind):
            raise RecipeError(f"pass imp: rewind is {self.rewind!r}; expected {' or '.join(get_args(Rewind))}")
        restart: Literal["optimizer", "all"] = "all" if self.rewind == "initial" else "optimizer"
        return Method(Rounds(self.step, self.every), Hard(), Left(), restart=restart)
