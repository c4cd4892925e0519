"""Training data: batches given in Python, checked, and cut anew into batches in an order that a seed decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec import data
from sparsec.errors import UsageError
from sparsec.pipeline import Context
from sparsec.program import Program
from sparsec.signature import Signature
from sparsec.training.labelled import Labelled
from sparsec.training.losses import BESIDE

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Batches:
    """Groups of samples of equal shapes: every batch comes from one of them, so nothing is padded."""

    groups: tuple[Batch, ...]
    size: int
    """Samples of a batch."""
    sha256: str
    samples: int

    def epoch(self, seed: int, number: int) -> list[Batch]:
        """The batches of an epoch in its order: the same for the same seed."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        parts: list[tuple[Batch, Tensor]] = []
        for group in self.groups:
            order = torch.randperm(_length(group), generator=generator)
            parts += [(group, chosen) for chosen in order.split(self.size)]
        mixed = torch.randperm(len(parts), generator=generator).tolist()
        return [{name: value[parts[i][1]] for name, value in parts[i][0].items()} for i in mixed]


def resolve(ctx: Context, name: str, who: str, program: Program, size: int) -> Batches:
    """`ctx.resources[name]`: batches, Labelled, or a function that gives them. A batch: a dict of inputs, and labels.

    Raises UsageError when there are none, or the program does not take them.
    """
    found = ctx.resources.get(name)
    if found is None:
        raise UsageError(
            f"pass {who} needs training data {name!r}: give it batches, dicts of input tensors and labels, in "
            f'Context(resources={{"{name}": [...]}}), or in Python compile(..., resources={{"{name}": [...]}})'
        )
    made = found() if callable(found) else found
    given = made.batches if isinstance(made, Labelled) else tuple(made)
    takes, groups = Signature.of(program), dict[tuple[Any, ...], list[Batch]]()
    for i, batch in enumerate(given):
        if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
            raise UsageError(f"{name}: batch {i} is a {type(batch).__name__}; expected a dict of tensors by input name")
        inputs = {key: value for key, value in batch.items() if key not in BESIDE or key in program.inputs}
        takes.check(inputs, f"{name}: batch {i}")
        if len({len(value) if value.dim() else -1 for value in batch.values()}) != 1:
            sizes = ", ".join(f"{key} {list(value.shape)}" for key, value in batch.items())
            raise UsageError(f"{name}: batch {i} has tensors of different numbers of samples: {sizes}")
        key = tuple((key, value.dtype, value.shape[1:]) for key, value in sorted(batch.items()))
        groups.setdefault(key, []).append(dict(batch))
    if not groups:
        raise UsageError(f"{name}: there are no batches; expected at least one dict of tensors by input name")
    for column in BESIDE:
        if len({column in batch for parts in groups.values() for batch in parts}) != 1:
            raise UsageError(f"{name}: some batches have {column} and some have none")
    joined = tuple({key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in groups.values())
    _check_size(takes, size, joined, name)
    return Batches(joined, size, data.content_hash(given), sum(map(_length, joined)))


def _check_size(takes: Signature, size: int, groups: tuple[Batch, ...], name: str) -> None:
    fixed = next((axes[0] for axes in takes.axes.values() if axes and isinstance(axes[0], int)), None)
    if fixed is None or (fixed == size and all(_length(group) % size == 0 for group in groups)):
        return
    raise UsageError(
        f"{name}: {takes.words}, so only batches of {fixed}; set batch_size={fixed} and give a multiple of {fixed} "
        "samples of each shape, or trace the model with a batch size that may vary"
    )


def _length(group: Batch) -> int:
    return len(next(iter(group.values())))
