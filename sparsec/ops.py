"""The operators of sparsec's own that a graph may call, with their portable references.

    nm_linear(x, values, positions, columns?, bias?, pattern, in_features, scales?, rows?) -> y
        `x`: (..., in_features); the tables are those of `layout` with batch 1; `y`: (..., out_features).
        With scales (int8 values) and V:N:M, x is rounded to int8 too: see `int8_linear`. N:M has no such kernel.
    nm_weight(values, positions, columns?, pattern, in_features, axes, shape, scales?, dtype?, rows?) -> weight
        The dense parameter of `shape` that the tables hold, seen through a `WeightView` with these axes: for layers
        that have no sparse kernel, whose weights are stored packed all the same. `dtype`: where it is not the values'.
    expert_linear(x, offsets, weight) -> y
        `x`: (tokens, in), sorted by expert; `offsets`: (experts,), where each expert's rows end; `weight`: (experts,
        in, out); `y`: (tokens, out). Rows beyond the last offset give 0. (The grouped product of expert layers.)

Backends replace the calls by faster functions when an artifact is loaded; these references define what they must
compute. Only kept weights touch the input in a kernel: NaN or Inf in an activation no row keeps does not reach y there.
With int8 V:N:M it does: a token that holds one gives NaN in every output, because it has no scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sparsec.layout import INT8_MAX, SparseLayout, decompress
from sparsec.pattern import VNM, Pattern
from sparsec.view import WeightView

_library = torch.library.Library("sparsec", "DEF")
_library.define(
    "nm_weight(Tensor values, Tensor positions, Tensor? columns, str pattern, int in_features, int[] axes, int[] shape,"
    " Tensor? scales=None, ScalarType? dtype=None, Tensor? rows=None) -> Tensor"
)
_library.define("expert_linear(Tensor x, Tensor offsets, Tensor weight) -> Tensor")
_library.define("expert_linear_backward(Tensor grad, Tensor x, Tensor offsets, Tensor weight) -> (Tensor, Tensor)")
_library.define(
    "nm_linear(Tensor x, Tensor values, Tensor positions, Tensor? columns, Tensor? bias, str pattern, "
    "int in_features, Tensor? scales=None, Tensor? rows=None) -> Tensor"
)
SMALLEST_TOKEN = 2.0**-100  # the largest magnitude below which a token's activations count as zeros, in int8


def layout_of(
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    pattern: str,
    in_features: int,
    scales: Tensor | None = None,
    rows: Tensor | None = None,
) -> SparseLayout:
    """The layout that the table arguments of an nm_linear call describe."""
    shape = (positions.shape[0], positions.shape[1], in_features)
    return SparseLayout(Pattern.parse(pattern), shape, values, positions, columns, scales, rows)


def rounds_activations(layout: SparseLayout) -> bool:
    """Whether nm_linear rounds the activations to int8 as well: the four shared columns of V:N:M make it fast."""
    return layout.scales is not None and isinstance(layout.pattern, VNM)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., cols) floating -> int8 of the same shape, and the float32 scale of each token, (..., 1).

    Symmetric: scale = largest / 127, q = x * (127 / largest) rounded to nearest even, -127..127. A token whose largest
    magnitude is below 2**-100 gives 0 and scale 0; one that is not finite gives 0 and scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    usable = largest.isfinite() & (largest >= SMALLEST_TOKEN)
    # A full tensor: torch computes a number / tensor as number * (1 / tensor), which rounds twice.
    factor = torch.where(usable, torch.full_like(largest, INT8_MAX) / largest, 0.0)
    scale = torch.where(largest.isfinite(), torch.where(usable, largest / INT8_MAX, 0.0), torch.nan)
    return torch.where(usable, x * factor, 0.0).round().to(torch.int8), scale


def int8_linear(x: Tensor, layout: SparseLayout, bias: Tensor | None) -> Tensor:
    """What an int8 kernel must compute, bit for bit: y[t, r] = (float(sum) * scale of t) * scale of r + bias[r].

    sum: of q[t, c] * value[r, c] over the kept columns c of row r, exact in int32, where q is `quantise_tokens(x)`.
    Every operation on floats is rounded to float32 by itself, in this order.
    """
    assert layout.scales is not None
    q, scale = quantise_tokens(x)
    unscaled = SparseLayout(layout.pattern, layout.shape, layout.values.double(), layout.positions, layout.columns)
    sums = torch.nn.functional.linear(q.double(), decompress(unscaled)[0])  # integers below 2**53: exact
    y = sums.float() * scale * layout.scales[0]
    return (y if bias is None else y + bias).to(x.dtype)


def _nm_linear(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    in_features: int,
    scales: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    layout = layout_of(values, positions, columns, pattern, in_features, scales, rows)
    if rounds_activations(layout):
        return int8_linear(x, layout, bias)
    return torch.nn.functional.linear(x, decompress(layout, x.dtype)[0], bias)


def _nm_linear_fake(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    bias: Tensor | None,
    pattern: str,
    in_features: int,
    scales: Tensor | None = None,
    rows: Tensor | None = None,
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
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    view = WeightView(tuple(axes), tuple(shape))
    layout = layout_of(values, positions, columns, pattern, in_features, scales, rows)
    return view.to_parameter(decompress(layout, dtype))


def _nm_weight_fake(
    values: Tensor,
    positions: Tensor,
    columns: Tensor | None,
    pattern: str,
    in_features: int,
    axes: list[int],
    shape: list[int],
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    return values.new_empty(shape, dtype=dtype or (values if scales is None else scales).dtype)


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
    grad_x, grad_weight = torch.ops.sparsec.expert_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weight


def _expert_linear_grads(grad: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """An operator too: it reads the offsets, which a traced backward cannot."""
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for expert, rows in _ranges(offsets):
        grad_x[rows] = grad[rows] @ weight[expert].T
        grad_weight[expert] = x[rows].T @ grad[rows]
    return grad_x, grad_weight


def _expert_linear_grads_fake(grad: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


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
    ("expert_linear_backward", _expert_linear_grads, _expert_linear_grads_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsec::{_name}", _shape, lib=_library)
torch.library.register_autograd(
    "sparsec::expert_linear", _expert_linear_backward, setup_context=_expert_linear_save, lib=_library
)

nm_linear = torch.ops.sparsec.nm_linear.default
nm_weight = torch.ops.sparsec.nm_weight.default
expert_linear = torch.ops.sparsec.expert_linear.default
