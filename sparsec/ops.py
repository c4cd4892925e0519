"""The operators of sparsec's own that a graph may call, with their portable references.

    nm_linear(x, values, positions, columns?, bias?, pattern, in_features) -> y
        `x`: (..., in_features); the tables are those of `layout` with batch 1; `y`: (..., out_features).
    nm_weight(values, positions, columns?, pattern, in_features, axes, shape) -> weight
        The dense parameter of `shape` that the tables hold, seen through a `WeightView` with these axes: for layers
        that have no sparse kernel, whose weights are stored packed all the same.
    expert_linear(x, offsets, weight) -> y
        `x`: (tokens, in), sorted by expert; `offsets`: (experts,), where each expert's rows end; `weight`: (experts,
        in, out); `y`: (tokens, out). Rows beyond the last offset give 0. (The grouped product of expert layers.)

Backends replace the calls by faster functions when an artifact is loaded; these references define what they must
compute. Only kept weights touch the input in a kernel: NaN or Inf in an activation no row keeps does not reach y there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsec.layout import SparseLayout, decompress
from sparsec.pattern import Pattern
from sparsec.view import WeightView

_library = torch.library.Library("sparsec", "DEF")
_library.define(
    "nm_weight(Tensor values, Tensor positions, Tensor? columns, str pattern, int in_features, int[] axes, int[] shape)"
    " -> Tensor"
)
_library.define("expert_linear(Tensor x, Tensor offsets, Tensor weight) -> Tensor")
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


def _nm_weight(
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    pattern: str,
    in_features: int,
    axes: list[int],
    shape: list[int],
) -> Tensor:
    view = WeightView(tuple(axes), tuple(shape))
    return view.to_parameter(decompress(layout_of(values, positions, columns, pattern, in_features)))


def _nm_weight_fake(
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    pattern: str,
    in_features: int,
    axes: list[int],
    shape: list[int],
) -> Tensor:
    return values.new_empty(shape)


def _expert_linear(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    y = x.new_zeros(x.shape[0], weight.shape[2])
    for expert, rows in _ranges(offsets):
        torch.mm(x[rows], weight[expert], out=y[rows])
    return y


def _expert_linear_fake(x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _expert_linear_save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _expert_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
    x, offsets, weight = ctx.saved_tensors
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for expert, rows in _ranges(offsets):
        grad_x[rows] = grad[rows] @ weight[expert].T
        grad_weight[expert] = x[rows].T @ grad[rows]
    return grad_x, None, grad_weight


def _ranges(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, and which."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = max(start, end)


for _name, _reference, _shape in (
    ("nm_linear", _nm_linear, _nm_linear_fake),
    ("nm_weight", _nm_weight, _nm_weight_fake),
    ("expert_linear", _expert_linear, _expert_linear_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsec::{_name}", _shape, lib=_library)
torch.library.register_autograd(
    "sparsec::expert_linear", _expert_linear_backward, setup_context=_expert_linear_save, lib=_library
)

nm_linear = torch.ops.sparsec.nm_linear.default
nm_weight = torch.ops.sparsec.nm_weight.default
expert_linear = torch.ops.sparsec.expert_linear.default
