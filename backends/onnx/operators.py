"""How operators that read sparse weights are written in ONNX; torch's exporter translates all others.

Every product keeps the weight's name and layout. `aten.linear` is Reshape, Gemm(transB=1), Reshape, or (form matmul)
MatMul with a Transpose of the weight; products of experts are one MatMul an expert, on the rows that are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sparsec.ops import expert_linear

if TYPE_CHECKING:
    from sparsec.backends.onnx.backend import Form


def translations(form: Form) -> dict[Any, Callable[..., Any]]:
    """torch operator -> its form in ONNX, for `torch.onnx.export`."""
    return {
        torch.ops.aten.linear.default: _linear if form == "gemm" else _linear_by_matmul,
        torch.ops.aten.mm.default: _mm,
        expert_linear: _expert_linear,
    }


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    from onnxscript import opset18 as op

    operands = (weight,) if bias is None else (weight, bias)
    rank = len(x.shape)
    if rank == 2:
        return op.Gemm(x, *operands, transB=1)
    rows, cols = (int(size) for size in weight.shape)
    product = op.Gemm(op.Reshape(x, op.Constant(value_ints=[-1, cols])), *operands, transB=1)
    return op.Reshape(product, op.Concat(op.Shape(x, start=0, end=rank - 1), op.Constant(value_ints=[rows]), axis=0))


def _linear_by_matmul(x: Any, weight: Any, bias: Any = None) -> Any:
    from onnxscript import opset18 as op

    product = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def _mm(x: Any, weight: Any) -> Any:
    """A layer without bias whose weight is stored as (in, out): a Gemm, as the one with bias."""
    from onnxscript import opset18 as op

    return op.Gemm(x, weight)


def _expert_linear(x: Any, offsets: Any, weight: Any) -> Any:
    """See `ops`: rows are sorted by expert, `offsets` say where those of each expert end, rows after the last are 0.

    One MatMul an expert: as many operations as there are rows, where one MatMul for all would do each row times each
    expert, or read a weight for each row.
    """
    from onnxscript import opset18 as op

    experts, _, outputs = (int(size) for size in weight.shape)
    axis, zero = op.Constant(value_ints=[0]), op.Constant(value_ints=[0])
    ends = op.Cast(offsets, to=7)
    starts, parts = zero, []
    for expert in range(experts):
        index = op.Constant(value_ints=[expert])
        end = op.Gather(ends, index)
        parts.append(op.MatMul(op.Slice(x, starts, end, axis), op.Gather(weight, index)))
        starts = end
    rest = op.Sub(op.Shape(x, start=0, end=1), starts)
    shape = op.Concat(op.Constant(value_ints=[1]), rest, op.Constant(value_ints=[outputs]), axis=0)
    zeros = op.Expand(op.CastLike(op.Constant(value_floats=[0.0]), x), shape)
    return op.Squeeze(op.Concat(*parts, zeros, axis=1), axis)
