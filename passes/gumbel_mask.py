"""The gumbel-mask pass: learn which weights to keep, and leave their values alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsec.errors import RecipeError
from sparsec.training.gumbel import Gumbel, Learnable, Likeliest
from sparsec.training.parts import Method
from sparsec.training.passes import TrainingPass


@dataclass(frozen=True)
class GumbelMask(TrainingPass):
    """Learn each group's mask among all ways to keep N of its M weights, and leave exact zeros in the weights.

    This is MaskLLM (Fang et al., arXiv 2409.17481) for every N:M that has at most 100 ways: 2:4 has 6, 4:8 has 70.
    V:N:M and unstructured patterns have too many and are refused with their number.

    1. A number for every way, its gate, is learnt by Adam at `gate_lr`; in training a group's mask is their mean under
       softmax((kappa gate + noise) / tau), where tau falls from 4 to .05 and kappa rises from 100 to 500.
    2. Gates begin at magnitude's mask, `prior` times as strong as the paper's random ones spread; those are left out.
       `keep_large` times the sum of squares of what is kept is taken off the loss.
    3. Pruned weights are not trained before masks are final: at the end, or before `frozen_epochs`, which train what
       is left. What is evaluated on the way are the likeliest masks.
    4. A site that is selected before keeps its selection. All other parameters are trained, with `lr`; the paper
       trains nothing but masks, for which they need requires_grad False.
    Not established: the paper's rate for gates, so `gate_lr` is ours. State for a site: 4 + 16 K / M bytes a weight, K
    the ways (28 for 2:4, 144 for 4:8), but none of Adam's 8; from the final masks on one byte, and Adam's.
    """

    name: ClassVar[str] = "gumbel-mask"

    gate_lr: float = 1e-3
    prior: float = 3.0
    keep_large: float = 1e-5
    frozen_epochs: int = 0

    def method(self) -> Method:
        self.positive("gate_lr")
        for name in ("prior", "keep_large"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(f"pass gumbel-mask: {name} is {getattr(self, name):g}; expected 0 or more")
        if not 0 <= self.frozen_epochs < self.epochs:
            raise RecipeError(
                f"pass gumbel-mask: frozen_epochs is {self.frozen_epochs} of {self.epochs} epochs; expected 0 or more, "
                "and at least one epoch that is not frozen"
            )
        update = Gumbel(self.gate_lr, self.prior, self.keep_large)
        return Method(Learnable(frozen_epochs=self.frozen_epochs), update, Likeliest())
