"""int8 V:2:M: canonical layout <-> packed stream, and the product with activations that are rounded to int8 by token.

    sparsec::int8_linear(Tensor x, Tensor stream, Tensor? bias, int out_features, str activation="none") -> Tensor

The numbers are those of `ops.int8_linear`, bit for bit at every level and thread count. See int8.h for the stream.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.library import LEVELS, Level
from sparsec.backends.kernel.cpu.linear import _ACTIVATIONS, Activation, _refuse_gradients, records_operators
from sparsec.errors import PatternError
from sparsec.layout import SparseLayout, pack_bits
from sparsec.pattern import VNM

_I64, _INT, _PTR = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_SIGNATURES = {
    "sparsec_int8_nbytes": (_I64, [_I64] * 4),
    "sparsec_int8_pack": (_INT, [_PTR] + [_I64] * 5 + [_PTR] * 4),
    "sparsec_int8_describe": (_INT, [_PTR, _I64, _PTR]),
    "sparsec_int8_unpack": (_INT, [_PTR, _I64] + [_PTR] * 4),
    "sparsec_int8_check": (_INT, [_PTR, _I64]),
    "sparsec_int8_workspace": (_I64, [_I64] * 2),
    "sparsec_int8_level": (_INT, [_INT]),
    "sparsec_int8_linear": (_INT, [_PTR, _I64] + [_PTR] * 3 + [_I64] * 3 + [_INT, _PTR, _INT, _INT]),
}


@cache
def _functions() -> ctypes.CDLL:
    found = library.library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def kernel_name(chosen: Level) -> str:
    """The int8 kernel that runs at a level: AVX-512 without VNNI runs that of AVX2."""
    found = LEVELS[_functions().sparsec_int8_level(LEVELS.index(chosen))]
    return "avx512vnni" if found == "avx512" else found


def pack(layout: SparseLayout) -> Tensor:
    """The stream of a layout that `layout.validate` accepts: batch 1, int8 values, V:N:M."""
    pattern, (batch, rows, cols) = layout.pattern, layout.shape
    if not isinstance(pattern, VNM) or batch != 1 or layout.scales is None:
        raise PatternError(
            f"the int8 kernels run int8 V:N:M of one matrix; found {layout.stored} {pattern}, batch {batch}"
        )
    nbytes = _functions().sparsec_int8_nbytes(pattern.m, pattern.v, rows, cols)
    if nbytes < 0:
        raise PatternError(f"{pattern} of a weight {rows} x {cols} is too large for the int8 kernels")
    selection = layout.selection()
    assert selection.columns is not None
    tables = [layout.values, selection.positions, selection.columns, layout.scales]
    tables = [table.cpu().contiguous() for table in tables]
    stream = torch.empty(nbytes, dtype=torch.uint8)
    code = _functions().sparsec_int8_pack(
        stream.data_ptr(), nbytes, pattern.m, pattern.v, rows, cols, *(table.data_ptr() for table in tables)
    )
    if code:
        raise PatternError(f"{pattern}: an index is out of range; `layout.validate` says where")
    return stream


def unpack(stream: Tensor) -> SparseLayout:
    """The layout a stream was packed from, bit for bit."""
    m, v, rows, cols = describe(stream)
    pattern = VNM(v, 2, m)
    groups = pattern.groups(cols)
    values = torch.empty(1, rows, groups, 2, dtype=torch.int8)
    positions = torch.empty(1, rows, groups * 2, dtype=torch.uint8)
    columns = torch.empty(1, pattern.strips(rows), groups, 4, dtype=torch.uint8)
    scales = torch.empty(1, rows)
    code = _functions().sparsec_int8_unpack(
        stream.data_ptr(), stream.numel(), *(table.data_ptr() for table in (values, positions, columns, scales))
    )
    if code:
        raise ValueError("the stream holds a code that is none of the six: it is damaged")
    return SparseLayout(pattern, (1, rows, cols), values, pack_bits(positions, 2), columns, scales)


def describe(stream: Tensor) -> tuple[int, int, int, int]:
    """(m, v, rows, cols) from the header. Raises ValueError for anything but a stream."""
    found = (ctypes.c_int64 * 4)()
    plain = stream.dtype == torch.uint8 and stream.dim() == 1 and stream.is_contiguous() and stream.device.type == "cpu"
    if not plain or _functions().sparsec_int8_describe(stream.data_ptr(), stream.numel(), found):
        raise ValueError("expected a uint8 tensor made by sparsec.backends.kernel.cpu.int8.pack")
    m, v, rows, cols = found
    return m, v, rows, cols


def check_stream(stream: Tensor) -> None:
    """Raise ValueError unless no kernel can read out of bounds with this stream."""
    describe(stream)
    if _functions().sparsec_int8_check(stream.data_ptr(), stream.numel()):
        raise ValueError("a column, code or scale of the stream is out of range: it is damaged")


def int8_linear(
    x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int, activation: Activation = "none"
) -> Tensor:
    """x: (..., in_features) float32; stream: from `pack`; y: (..., out_features). No gradients.

    A token that holds NaN or Inf gives NaN in every output. activation: as in torch.nn.functional.
    """
    if records_operators(x):
        _refuse_gradients(x)
        return torch.ops.sparsec.int8_linear(x, stream, bias, out_features, activation)  # type: ignore[no-any-return]
    if x.requires_grad:
        _refuse_gradients(x)
    return _op(x, stream, bias, out_features, activation)


def run(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out_features: int,
    threads: int,
    chosen: Level,
    activation: Activation = "none",
) -> Tensor:
    """`int8_linear` with a given thread count and level, on plain CPU tensors."""
    if x.dtype is not torch.float32 or not x.is_cpu:
        raise TypeError(f"the CPU kernels take float32 on the CPU; found {x.dtype} on {x.device}: convert x first")
    if not stream.is_cpu or stream.dtype is not torch.uint8 or not stream.is_contiguous():
        raise TypeError(
            f"expected a stream of bytes on the CPU, found {stream.dtype} on {stream.device}: load it again"
        )
    if threads < 1 or not x.dim():
        raise ValueError(f"expected at least 1 thread and x (..., in_features), found {threads} and {tuple(x.shape)}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"found activation {activation}; expected one of {', '.join(_ACTIVATIONS)}")
    x = x.contiguous()
    *lead, cols = x.shape
    y = x.new_empty(*lead, out_features)
    tokens = y.numel() // out_features
    if not tokens:
        return y
    bias_at = None
    if bias is not None:
        if bias.dtype is not torch.float32 or bias.shape != (out_features,) or not bias.is_cpu:
            raise TypeError(f"expected a float32 CPU bias ({out_features},), found {bias.dtype} {tuple(bias.shape)}")
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    native = _functions()
    workspace = torch.empty(native.sparsec_int8_workspace(tokens, cols), dtype=torch.uint8)
    code = native.sparsec_int8_linear(
        stream.data_ptr(), stream.numel(), x.data_ptr(), bias_at, y.data_ptr(), tokens, out_features, cols,
        _ACTIVATIONS[activation], workspace.data_ptr(), threads, LEVELS.index(chosen),
    )  # fmt: skip
    if code == 2:
        raise RuntimeError(f"this processor cannot run the {chosen} kernels")
    if code:
        *_, rows, stream_cols = describe(stream)
        found = f"out_features {out_features}, in_features {cols}"
        raise ValueError(f"the stream is for a weight {rows} x {stream_cols}; found {found}")
    return y


def _op(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int, activation: Activation = "none") -> Tensor:
    chosen = library.level()
    if chosen is None:
        raise RuntimeError(str(library.unavailable_reason()))
    return run(x, stream, bias, out_features, torch.get_num_threads(), chosen, activation)


def _fake(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int, activation: Activation = "none") -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_ops = torch.library.Library("sparsec", "FRAGMENT")
_ops.define("int8_linear(Tensor x, Tensor stream, Tensor? bias, int out_features, str activation='none') -> Tensor")
_ops.impl("int8_linear", _op, "CPU")
torch.library.register_fake("sparsec::int8_linear", _fake, lib=_ops)
