"""The operator a lowered graph calls, `sparsec::nm_linear`, with its portable reference.

    nm_linear(x, values, positions, columns?, bias?, pattern, in_features) -> y

`x`: (..., in_features); the tables are those of `layout` with batch 1; `y`: (..., out_features). Backends replace the
calls by faster functions when an artifact is loaded; this reference defines what they must compute. Only kept weights
touch the input in a kernel: NaN or Inf in an activation no row keeps does not reach the output there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.layout import SparseLayout, decompress
from sparsec.pattern import Pattern

_library = torch.library.Library("sparsec", "DEF")
_library.define(
    "nm_linear(Tensor x, Tensor values, Tensor positions, Tensor? columns, Tensor? bias, str pattern, "
    "int in_features) -> Tensor"
)


def layout_of(
    values: Tensor, positions: Tensor, columns: Tensor | None, pattern: str, in_features: int
) -> SparseLayout:
    """The layout that the table arguments of an nm_linear call describe."""
    shape = (positions.shape[0], positions.shape[1], in_features)
    return SparseLayout(Pattern.parse(pattern), shape, values, positions, columns)


def _nm_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    in_features: int,
) -> Tensor:
    weight = decompress(layout_of(values, positions, columns, pattern, in_features))[0]
    return torch.nn.functional.linear(x, weight.to(x.dtype), bias)


def _nm_linear_fake(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], positions.shape[1])


_library.impl("nm_linear", _nm_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsec::nm_linear", _nm_linear_fake, lib=_library)

nm_linear = torch.ops.sparsec.nm_linear.default
