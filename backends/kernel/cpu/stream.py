"""Canonical layout <-> packed stream, the one uint8 tensor that the CPU kernels read. See stream.h for its format."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu.library import library
from sparsec.errors import PatternError
from sparsec.layout import SparseLayout, column_type, pack_bits
from sparsec.pattern import NM, VNM, SharedColumns, Strip

_VALUE_TYPES = (torch.float32, torch.bfloat16)  # a type's place is its number in stream.h


class Header(NamedTuple):
    """What a stream says of its weight: `Pattern` in stream.h."""

    n: int
    m: int
    v: int
    """0 for N:M."""
    rows: int
    cols: int
    value_type: int
    """A place in `_VALUE_TYPES`."""
    strip: int
    """1: columns come from anywhere."""
    moved: int
    """1: rows are not stored in their order."""

    @property
    def pattern(self) -> NM | VNM | Strip:
        if not self.v:
            return NM(self.n, self.m)
        return (Strip if self.strip else VNM)(self.v, self.n, self.m)


def pack(layout: SparseLayout) -> Tensor:
    """The stream of a layout that `layout.validate` accepts: batch 1, float32 or bfloat16 values, and N:M, V:N:M or a
    strip pattern with V a multiple of 16."""
    pattern, (batch, rows, cols) = layout.pattern, layout.shape
    if not isinstance(pattern, (NM, SharedColumns)) or batch != 1:
        raise PatternError(f"the CPU kernels run N:M, V:N:M and strips of one matrix; found {pattern}, batch {batch}")
    if layout.values.dtype not in _VALUE_TYPES:
        raise PatternError(f"a stream holds float32 or bfloat16 values, not {layout.values.dtype}: convert them first")
    value_type, strip = _VALUE_TYPES.index(layout.values.dtype), isinstance(pattern, Strip)
    v = pattern.v if isinstance(pattern, SharedColumns) else 0
    header = Header(pattern.n, pattern.m, v, rows, cols, value_type, strip, layout.rows is not None)
    selection = layout.selection()
    columns = None if selection.columns is None else _of_weight(pattern, selection.columns.cpu())
    tables = [layout.values, selection.positions, columns, layout.rows]
    tables = [None if table is None else table.cpu().contiguous() for table in tables]
    described = (ctypes.c_int64 * len(header))(*header)
    nbytes = library().sparsec_stream_nbytes(described)
    if nbytes < 0:
        raise PatternError(f"{pattern} of a weight {rows} x {cols} does not fit the CPU kernels: {_LIMITS}")
    stream = torch.empty(nbytes, dtype=torch.uint8)
    code = library().sparsec_pack(
        stream.data_ptr(), nbytes, described, *(None if table is None else table.data_ptr() for table in tables)
    )
    if code:
        raise PatternError(f"{pattern}: a position is out of range or names padding; `layout.validate` says where")
    return stream


_LIMITS = "a strip has a multiple of 16 rows, and a weight fewer than 2^31 rows and columns"


def _of_weight(pattern: NM | SharedColumns, columns: Tensor) -> Tensor:
    """The columns of a weight, int32, that a table names: offsets in windows, but for strips."""
    starts = torch.arange(columns.shape[2], dtype=torch.int32)[:, None] * pattern.m
    return columns.int() if isinstance(pattern, Strip) else columns.int() + starts


def unpack(stream: Tensor) -> SparseLayout:
    """The layout a stream was packed from, bit for bit."""
    header = describe(stream)
    pattern, rows, cols = header.pattern, header.rows, header.cols
    groups = pattern.groups(cols)
    values = torch.empty(1, rows, groups, pattern.n, dtype=_VALUE_TYPES[header.value_type])
    positions = torch.empty(1, rows, groups * pattern.n, dtype=torch.uint8)
    shared = isinstance(pattern, SharedColumns)
    columns = torch.empty(1, pattern.strips(rows), groups, 4, dtype=torch.int32) if shared else None
    moved = torch.empty(1, rows, dtype=torch.int32) if header.moved else None
    library().sparsec_unpack(
        stream.data_ptr(), stream.numel(),
        *(None if table is None else table.data_ptr() for table in (values, positions, columns, moved)),
    )  # fmt: skip
    bits = 2 if shared else (pattern.m - 1).bit_length()
    if columns is not None:
        columns = (columns - (_of_weight(pattern, torch.zeros_like(columns)))).to(column_type(pattern, cols))
    return SparseLayout(pattern, (1, rows, cols), values, pack_bits(positions, bits), columns, rows=moved)


def describe(stream: Tensor) -> Header:
    """The header. Raises ValueError for anything but a stream."""
    found = (ctypes.c_int64 * len(Header._fields))()
    plain = stream.dtype == torch.uint8 and stream.dim() == 1 and stream.is_contiguous() and stream.device.type == "cpu"
    if not plain or library().sparsec_describe(stream.data_ptr(), stream.numel(), found):
        raise ValueError("expected a uint8 tensor made by sparsec.backends.kernel.cpu.stream.pack")
    return Header(*found)


def check_stream(stream: Tensor) -> None:
    """Raise ValueError unless no kernel can read out of bounds with this stream."""
    describe(stream)
    if library().sparsec_check(stream.data_ptr(), stream.numel()):
        raise ValueError("a table of the stream names what is not there: the stream is damaged")
