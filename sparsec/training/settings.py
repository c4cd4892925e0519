"""How long and how fast to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sparsec.errors import UsageError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train."""

    epochs: int = 3
    lr: float = 5e-5
    accumulate: int = 1
    """Batches of an optimizer step."""
    max_grad_norm: float = 1.0
    """0: no clipping."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0
    precision: Precision = "fp32"
    """bf16: products are computed in bfloat16 (autocast); weights, gradients and the optimizer stay float32."""

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "lr": self.lr, "accumulate": self.accumulate}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value:g}; expected a number above 0")
        for name, value in {"max_grad_norm": self.max_grad_norm, "weight_decay": self.weight_decay}.items():
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value:g}; expected 0 or more")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup:g}; expected a share of the steps, from 0 to below 1")
        if self.precision not in get_args(Precision):
            raise UsageError(f"precision is {self.precision!r}; expected one of {', '.join(get_args(Precision))}")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, the first is 0: linearly up, then linearly down to 0 after the last."""
        rising = self.warmup * steps
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr * (steps - step) / max(steps - rising, 1)
