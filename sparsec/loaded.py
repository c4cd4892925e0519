"""A traced model and what came with it: held-out inputs, and tools that make data for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparsec.data import Calibration, Tools
from sparsec.program import Program

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loaded:
    """A traced model, and held-out inputs on which quality against the dense original is measured."""

    program: Program
    samples: tuple[dict[str, Tensor], ...]
    samples_are: str
    """Where the samples come from, in words."""
    tools: Tools = field(default_factory=Tools)
    """What makes calibration data of text and pictures; empty where only a graph was given."""
    head: str = ""
    """A head that is new, in words: nobody has trained it. Empty: all weights are as they were stored."""
    made_up: bool = False
    """Whether the samples are noise, or ids of which nothing is known."""

    def judged_on(self, data: Calibration | None) -> Loaded:
        """With the longest samples that were calibrated on, in place of made-up ones, which say little of real data."""
        if data is None or not self.made_up:
            return self
        batch = data.batches[-1]
        words = f"{len(next(iter(batch.values())))} of the samples that it was calibrated on"
        return replace(self, samples=(batch,), samples_are=words)


def with_random_samples(program: Program, seed: int) -> Loaded:
    """Samples like the example inputs: noise for floats; integers stay as they are, for their range is unknown."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    made = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for name, value in program.inputs.items()
    }
    return Loaded(program, (made,), "random inputs like the example's", made_up=True)
