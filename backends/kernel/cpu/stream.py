"""Canonical layout <-> packed stream, the one uint8 tensor that the CPU kernels read. See stream.h for its format."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu.library import library
from sparsec.errors import PatternError
from sparsec.layout import SparseLayout, pack_bits
from sparsec.pattern import NM, VNM

_VALUE_TYPES = (torch.float32, torch.bfloat16)  # a type's place is its number in stream.h


def pack(layout: SparseLayout) -> Tensor:
    """The stream of a layout that `layout.validate` accepts: batch 1, float32 or bfloat16 values, N:M or V:N:M."""
    pattern, (batch, rows, cols) = layout.pattern, layout.shape
    if not isinstance(pattern, (NM, VNM)) or batch != 1:
        raise PatternError(f"the CPU kernels run N:M and V:N:M of one matrix; found {pattern}, batch {batch}")
    if layout.values.dtype not in _VALUE_TYPES:
        raise PatternError(f"a stream holds float32 or bfloat16 values, not {layout.values.dtype}: convert them first")
    value_type = _VALUE_TYPES.index(layout.values.dtype)
    n, m, v = pattern.n, pattern.m, pattern.v if isinstance(pattern, VNM) else 0
    selection = layout.selection()
    values = layout.values.cpu().contiguous()
    positions = selection.positions.cpu().contiguous()
    columns = None if selection.columns is None else selection.columns.cpu().contiguous()
    nbytes = library().sparsec_stream_nbytes(n, m, v, rows, cols, value_type)
    if nbytes < 0:
        raise PatternError(f"{pattern} of a weight {rows} x {cols} is too large for the CPU kernels")
    stream = torch.empty(nbytes, dtype=torch.uint8)
    code = library().sparsec_pack(
        stream.data_ptr(), nbytes, n, m, v, rows, cols, value_type,
        values.data_ptr(), positions.data_ptr(), None if columns is None else columns.data_ptr(),
    )  # fmt: skip
    if code:
        raise PatternError(f"{pattern}: a position is out of range or names padding; `layout.validate` says where")
    return stream


def unpack(stream: Tensor) -> SparseLayout:
    """The layout a stream was packed from, bit for bit."""
    n, m, v, rows, cols, value_type = describe(stream)
    pattern = VNM(v, n, m) if v else NM(n, m)
    groups = pattern.groups(cols)
    values = torch.empty(1, rows, groups, n, dtype=_VALUE_TYPES[value_type])
    positions = torch.empty(1, rows, groups * n, dtype=torch.uint8)
    columns = torch.empty(1, -(-rows // v), groups, 4, dtype=torch.uint8) if v else None
    library().sparsec_unpack(
        stream.data_ptr(), stream.numel(), values.data_ptr(), positions.data_ptr(),
        None if columns is None else columns.data_ptr(),
    )  # fmt: skip
    bits = 2 if v else (m - 1).bit_length()
    return SparseLayout(pattern, (1, rows, cols), values, pack_bits(positions, bits), columns)


def describe(stream: Tensor) -> tuple[int, int, int, int, int, int]:
    """(n, m, v, rows, cols, value type) from the header: v is 0 for N:M, and the type a place in `_VALUE_TYPES`.

    Raises ValueError for anything but a stream.
    """
    found = (ctypes.c_int64 * 6)()
    plain = stream.dtype == torch.uint8 and stream.dim() == 1 and stream.is_contiguous() and stream.device.type == "cpu"
    if not plain or library().sparsec_describe(stream.data_ptr(), stream.numel(), found):
        raise ValueError("expected a uint8 tensor made by sparsec.backends.kernel.cpu.stream.pack")
    n, m, v, rows, cols, value_type = found
    return n, m, v, rows, cols, value_type


def check_stream(stream: Tensor) -> None:
    """Raise ValueError unless no kernel can read out of bounds with this stream."""
    describe(stream)
    if library().sparsec_check(stream.data_ptr(), stream.numel()):
        raise ValueError("an index of the stream leaves its group: the stream is damaged")
