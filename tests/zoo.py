"""69 model classes of Hugging Face transformers, tiny and random, as a user would pass them to `sparsec.trace`.

Hidden size 32, two layers, four heads and odd feed-forward sizes, so that every pattern has tails. Everything random in
training (dropout, layerdrop, stochastic depth, SpecAugment) is left on, as is the cache.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zoo_table import BATCH, LENGTH, LIMIT, ROWS, VOCABULARY

Build = Callable[[], "Case"]


@dataclass(frozen=True)
class Case:
    """A model and what `trace` needs to know of it."""

    model: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]
    limits: dict[str, int | tuple[int, int]]

    def in_dtype(self, dtype: torch.dtype) -> Case:
        """The same, cast."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        return dataclasses.replace(self, model=self.model.to(dtype), inputs=inputs)

    def other_inputs(self) -> dict[str, Tensor]:
        """Inputs of another batch, and of another length where that is dynamic."""
        sizes = {"batch": 3, "length": LENGTH + 4, "decoder_length": 3, "samples": 520}
        inputs = {}
        for seed, (name, value) in enumerate(self.inputs.items(), start=50):
            shape = list(value.shape)
            for axis, size in self.dynamic.get(name, {}).items():
                shape[axis] = sizes[size]
            inputs[name] = _input(name, tuple(shape), seed).to(value.dtype)
        return inputs


def _input(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name.endswith("input_ids"):
        return torch.randint(3, VOCABULARY - 3, shape, generator=generator)
    if name == "attention_mask":
        mask = torch.ones(shape, dtype=torch.int64)
        mask[-1, shape[1] - 2 :] = 0
        return mask
    if name == "token_type_ids":
        return (torch.arange(shape[1]) >= shape[1] // 2).long().expand(shape).clone()
    return torch.randn(shape, generator=generator)


_LIMITS: dict[str, int | tuple[int, int]] = {"length": LIMIT, "decoder_length": LIMIT, "samples": (24, 4096)}
_AXES = {
    "input_ids": {0: "batch", 1: "length"},
    "attention_mask": {0: "batch", 1: "length"},
    "token_type_ids": {0: "batch", 1: "length"},
    "decoder_input_ids": {0: "batch", 1: "decoder_length"},
    "input_values": {0: "batch", 1: "samples"},
}
_SHAPES: dict[str, tuple[int, ...]] = {
    "input_ids": (BATCH, LENGTH),
    "attention_mask": (BATCH, LENGTH),
    "token_type_ids": (BATCH, LENGTH),
    "decoder_input_ids": (BATCH, 5),
}


def build(
    config: str, model: str, options: dict[str, Any], names: str, shape: tuple[int, ...], fixed: str = ""
) -> Case:
    """The model in eval mode, its weights away from their initial values: 0 and 1 would hide a wrong graph.

    `shape`: of the inputs that have no shape of their own, such as pixels. `fixed`: sizes the model does not let vary.
    """
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for name, buffer in made.named_buffers():
                if "running_" in name:
                    buffer.add_(torch.rand_like(buffer))
    inputs = {name: _input(name, _SHAPES.get(name, shape), seed) for seed, name in enumerate(names.split())}
    axes = {name: _AXES.get(name, {0: "batch"}) for name in inputs}
    dynamic = {name: {a: s for a, s in sizes.items() if s not in fixed.split()} for name, sizes in axes.items()}
    known = {size for sizes in dynamic.values() for size in sizes.values()}
    return Case(made, inputs, dynamic, {size: limit for size, limit in _LIMITS.items() if size in known})


ZOO: dict[str, Build] = {name: (lambda row=row: build(*row)) for name, row in ROWS.items()}
NOT_TRACEABLE = {"longformer"}
