"""Weights as other tools store them, made dense again bit for bit, one at a time.

`sparse-bitmask` and `sparse-24-bitmask` are codecs of compressed-tensors. Of a weight (..., cols) they store `shape`,
`bitmask` (uint8, rows of ceil(cols / 8) bytes; bit c % 8 of byte c // 8, from the lowest, is set where column c is
kept) and `compressed`, the kept values in row-major order: of 2:4 as (rows, cols / 2); of the other flat, with a table
of where rows begin, which nothing needs. Their names begin with the module's or with the parameter's.

A masked weight is stored beside its mask, under names of modelopt, Apex ASP, torch.nn.utils.prune or torch.ao.pruning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsec.errors import ArtifactError
from sparsec.migrating.stored import Stored
from sparsec.selection import kept_only

if TYPE_CHECKING:
    from torch import Tensor

CODECS = ("sparse-24-bitmask", "sparse-bitmask", "dense")
_VALUES, _BITS, _SHAPE, _ROWS = ".compressed", ".bitmask", ".shape", ".row_offsets"
_MASKS = {  # how the name of a mask ends -> of its weight
    "_weight_mask": "weight",
    "__weight_mma_mask": "weight",
    "weight_mask": "weight_orig",
    "parametrizations.weight.0.mask": "parametrizations.weight.original",
}
_DROPPED = ("__weight_mma_pruned_p",)  # Apex ASP's copy of what it pruned


def is_encoded(stored: Stored) -> bool:
    """Whether something is stored otherwise than as the model has it."""
    return bool(_packed(stored) or dict(_masks(stored)))


def decoded(stored: Stored) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under the name it has in the model, dense. Raises ArtifactError where parts miss or do not fit."""
    masks = dict(_masks(stored))
    parts = {base + end for base in _packed(stored) for end in (_VALUES, _BITS, _SHAPE, _ROWS)}
    for base in _packed(stored):
        if missing := [end for end in (_VALUES, _SHAPE) if base + end not in stored]:
            raise ArtifactError(f"{base}{_BITS} is stored, {base}{missing[0]} is not: a file is missing or damaged")
        yield _parameter(base), unpack(base, *(stored[base + end]() for end in (_VALUES, _BITS, _SHAPE)))
    for name, read in stored.items():
        if name in parts or name in masks.values() or name.endswith(_DROPPED):
            continue
        yield _model_name(name, masks), _masked(name, read(), stored[masks[name]]()) if name in masks else read()


def _packed(stored: Stored) -> list[str]:
    return [name.removesuffix(_BITS) for name in stored if name.endswith(_BITS)]


def _parameter(base: str) -> str:
    return base if base.endswith((".weight", ".bias")) else f"{base}.weight"


def unpack(name: str, values: Tensor, bits: Tensor, shape: Tensor) -> Tensor:
    """A weight of one of the bitmask codecs. `name`: for errors. Copies bits: -0.0 and NaN stay what they are."""
    import numpy
    import torch

    size: list[int] = shape.flatten().long().tolist() or [-1]
    rows, cols = torch.Size(size[:-1]).numel(), size[-1]
    if bits.dtype != torch.uint8 or min(size) < 0 or bits.numel() != rows * -(-cols // 8):
        raise ArtifactError(
            f"{name}{_BITS} is {bits.dtype} of shape {list(bits.shape)}; for a weight {size} expected {rows} rows of "
            f"{-(-cols // 8)} bytes: the file is damaged"
        )
    packed = bits.contiguous().numpy().reshape(rows, -1)
    kept = torch.from_numpy(numpy.unpackbits(packed, axis=1, count=cols, bitorder="little")).view(torch.bool)
    if int(kept.sum()) != values.numel():
        raise ArtifactError(
            f"{name}: {values.numel()} values are stored, but {int(kept.sum())} bits are set: the file is damaged"
        )
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(values.element_size())
    if word is None:
        raise ArtifactError(f"{name}: its values are {values.dtype}; expected real numbers of 1, 2, 4 or 8 bytes")
    dense = torch.zeros(rows, cols, dtype=word)
    dense[kept] = values.contiguous().flatten().view(word)
    return dense.view(values.dtype).reshape(size)


def _masks(stored: Stored) -> Iterator[tuple[str, str]]:
    """Masked weights with the names of their masks."""
    for name in stored:
        for end, weight in _MASKS.items():
            base = name.removesuffix(end)
            if base != name and (not base or base.endswith(".")) and base + weight in stored:
                yield base + weight, name


def _model_name(name: str, masks: dict[str, str]) -> str:
    if name not in masks:
        return name
    return name.replace("parametrizations.weight.original", "weight").removesuffix("_orig")


def _masked(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    if mask.shape != weight.shape or not bool(((mask == 0) | (mask == 1)).all()):
        raise ArtifactError(
            f"{name} has the shape {list(weight.shape)}, its mask {list(mask.shape)} of {mask.dtype}; expected a mask "
            "of the same shape that holds 0 and 1 only"
        )
    return kept_only(weight.contiguous(), mask.bool())
