"""A traced model and what came with it: inputs to judge it by, and tools that make data for it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from sparsec.data import Calibration, Tools
from sparsec.program import Program
from sparsec.signature import Signature

if TYPE_CHECKING:
    from torch import Tensor

_JUDGED = 8  # samples


@dataclass(frozen=True)
class Loaded:
    """A traced model, and inputs on which quality against the dense original is measured: held out, where there are."""

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
        count = len(next(iter(batch.values())))
        samples: tuple[dict[str, Tensor], ...] = (batch,)
        if Signature.of(self.program).one_by_one:  # of many tokens at once, logits take gigabytes
            count = min(count, _JUDGED)
            samples = tuple({name: value[i : i + 1] for name, value in batch.items()} for i in range(count))
        return replace(self, samples=samples, samples_are=f"{count} of the samples that it was calibrated on")


def with_random_samples(program: Program, seed: int) -> Loaded:
    """Samples like the example inputs: noise for floats; integers stay as they are, for their range is unknown."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    made = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for name, value in program.inputs.items()
    }
    return Loaded(program, (made,), "random inputs like the example's", made_up=True)
