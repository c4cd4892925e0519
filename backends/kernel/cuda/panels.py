"""Weights as the GPU kernels read them: "vnm-panel v1", made from the canonical layout when a model is loaded.

A panel is 64 rows. A step is 16 groups: 64 gathered columns, out of the window of 16 M neighbouring ones where the
pattern has a window of M <= 16, out of all columns otherwise. One buffer of bytes holds, one after the other,
    values   fp16 or bf16 [panels][steps][2 halves][4 tiles][32 lanes][8]
             Of a tile of 16 rows and 32 gathered columns, lane 4 g + t holds 4 pairs, the two kept values of a group:
             (row g, group t), (row g + 8, group t), (row g, group t + 4), (row g + 8, group t + 4).
    metadata uint32 [panels][steps][32 lanes][4 tiles], ordered: the 4 bits of a group are low | high << 2, low < high
             Lane 4 g + 2 h + k holds, of half h, row g in its low and row g + 8 in its high 16 bits, groups 4 k to
             4 k + 3. So half h is what selector h of mma.sp.m16n8k32 reads.
    index    [panels][steps][blocks][64]: which column stands in each gathered one; a block is the largest number of
             rows that divides 64 and V, and shares columns. Windows: uint8, place in the window. Otherwise int32,
             column of the weight. A column beyond the weight reads zeros; the slots that fill the last step name one.
    rows     int32 [64 panels], only of strips whose rows moved: where a row of the tables goes; -1: nowhere.
Rows that fill the last panel hold values 0. The largest share of a dense 16-bit weight, values and metadata, is 0.571
(2:4); 64:2:8 takes 0.285.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparsec.errors import PatternError
from sparsec.layout import SparseLayout, column_type, pack_bits
from sparsec.pattern import NM, Pattern, SharedColumns, Strip

ROWS, GROUPS = 64, 16  # of a panel, of a step
MOST_WINDOW = 16  # M of the largest window whose places fit one byte
DTYPES = (torch.bfloat16, torch.float16)
_TABLES = ("values", "metadata", "index", "rows")


def no_panels(pattern: Pattern) -> str | None:
    """Why the weights of a pattern cannot be panels, or None."""
    if pattern == NM(2, 4):
        return None
    if not isinstance(pattern, SharedColumns):
        return f"{pattern}: the GPU's sparse tensor cores take 2:4 and V:2:M, whose rows share columns"
    if pattern.v % 16:
        return f"{pattern}: the GPU kernels take 16 rows at once, so V must be a multiple of 16, best of 64"
    return None


@dataclass(frozen=True)
class Form:
    """How many panels, steps and blocks the weight (rows, cols) of a pattern has, and where its tables begin."""

    pattern: NM | SharedColumns
    rows: int
    cols: int
    moved: bool = False

    @property
    def window(self) -> int:
        """M, or 0 where a step gathers from all columns."""
        return 0 if isinstance(self.pattern, Strip) or self.pattern.m > MOST_WINDOW else self.pattern.m

    @property
    def blocks(self) -> int:
        """Blocks of rows with columns of their own in a panel: 1, 2 or 4."""
        return ROWS // math.gcd(ROWS, self.pattern.v) if isinstance(self.pattern, SharedColumns) else 1

    @property
    def panels(self) -> int:
        return math.ceil(self.rows / ROWS)

    @property
    def steps(self) -> int:
        return math.ceil(self.pattern.groups(self.cols) / GROUPS)

    @cached_property
    def starts(self) -> dict[str, int]:
        """The first byte of each table, in their order."""
        sizes = (4096 * self.steps, 512 * self.steps, self.blocks * self.steps * 64 * (1 if self.window else 4))
        starts = [0, *(self.panels * sum(sizes[: i + 1]) for i in range(len(sizes)))]
        return dict(zip(_TABLES, starts, strict=True))

    @property
    def nbytes(self) -> int:
        return self.starts["rows"] + (4 * ROWS * self.panels if self.moved else 0)

    def tables(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tables of a buffer, as flat views of their types; values as int16, metadata as bytes."""
        ends = [*list(self.starts.values())[1:], self.nbytes]
        cut = {name: buffer[start:end] for (name, start), end in zip(self.starts.items(), ends, strict=True)}
        cut["values"] = cut["values"].view(torch.int16)
        cut["index"] = cut["index"] if self.window else cut["index"].view(torch.int32)
        cut["rows"] = cut["rows"].view(torch.int32)
        return cut


def form_of_layout(layout: SparseLayout) -> Form:
    """The form that `pack` gives a layout of a pattern that has panels."""
    assert isinstance(layout.pattern, (NM, SharedColumns))
    return Form(layout.pattern, *layout.shape[1:], layout.rows is not None)


def form_of(buffer: Tensor, pattern: NM | SharedColumns, rows: int, cols: int) -> Form:
    """The form of a buffer, which its size tells. Raises ValueError where it is of another weight."""
    for form in (Form(pattern, rows, cols), Form(pattern, rows, cols, moved=True)):
        if buffer.dtype == torch.uint8 and buffer.shape == (form.nbytes,):
            return form
    expected = Form(pattern, rows, cols).nbytes
    raise ValueError(
        f"expected the panels of a {pattern} weight {rows} x {cols}, {expected} bytes, found {buffer.dtype} "
        f"{tuple(buffer.shape)}: load the artifact again"
    )


def pack(layout: SparseLayout, dtype: torch.dtype) -> Tensor:
    """Panels, uint8, on the layout's device, of a validated layout with batch 1; values are rounded to `dtype`.

    Raises PatternError for what `no_panels` names, and where a value is beyond the range of `dtype`.
    """
    pattern, (batch, rows, _) = layout.pattern, layout.shape
    if reason := no_panels(pattern):
        raise PatternError(reason)
    assert isinstance(pattern, (NM, SharedColumns)) and batch == 1 and dtype in DTYPES and layout.scales is None
    form, values = form_of_layout(layout), layout.values[0].to(dtype)
    if not bool(torch.isfinite(values).all()):
        raise PatternError(f"{pattern}: a weight is beyond the range of {dtype}; load the model as bfloat16")
    positions = layout.selection().positions[0]
    nibbles = positions[..., 0] | positions[..., 1] << 2
    more = (0, form.steps * GROUPS - nibbles.shape[1], 0, form.panels * ROWS - rows)
    nibbles = torch.nn.functional.pad(nibbles, more, value=0b0100)
    values = torch.nn.functional.pad(values, (0, 0, *more)).view(torch.int16)
    columns = _columns(layout, form)
    index = columns if form.window == 0 else columns - _window_starts(form, columns.device)
    tables = [
        # panel tile high g step half later t pair -> panel step half tile g t later high pair
        values.view(form.panels, 4, 2, 8, form.steps, 2, 2, 4, 2).permute(0, 4, 5, 1, 3, 7, 6, 2, 8),
        # panel tile high g step half k byte -> panel step g half k tile high byte
        (nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
        .view(form.panels, 4, 2, 8, form.steps, 2, 2, 2)
        .permute(0, 4, 3, 5, 6, 1, 2, 7),
        index.to(torch.uint8 if form.window else torch.int32),
    ]
    if layout.rows is not None:
        tables.append(torch.nn.functional.pad(layout.rows[0], (0, more[3]), value=-1))
    return torch.cat([table.contiguous().view(-1).view(torch.uint8) for table in tables])


def unpack(buffer: Tensor, pattern: NM | SharedColumns, rows: int, cols: int, dtype: torch.dtype) -> SparseLayout:
    """The layout that was packed, with its values as `dtype`, which they were rounded to."""
    form, groups = form_of(buffer, pattern, rows, cols), pattern.groups(cols)
    tables = form.tables(buffer)
    values = tables["values"].view(form.panels, form.steps, 2, 4, 8, 4, 2, 2, 2).permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    kept = values.reshape(form.panels * ROWS, -1, 2)[:rows, :groups].contiguous().view(dtype)
    pairs = tables["metadata"].view(form.panels, form.steps, 8, 2, 2, 4, 2, 2).permute(0, 5, 6, 2, 1, 3, 4, 7)
    nibbles = torch.stack([pairs & 15, pairs >> 4], -1).reshape(form.panels * ROWS, -1)[:rows, :groups]
    positions = pack_bits(torch.stack([nibbles & 3, nibbles >> 2], -1).flatten(1)[None], 2)
    moved = tables["rows"][None, :rows] if form.moved else None
    if isinstance(pattern, NM):
        return SparseLayout(pattern, (1, rows, cols), kept[None], positions)
    index = tables["index"].view(form.panels, form.steps, form.blocks, 64).long()
    if form.window:
        index = index + _window_starts(form, index.device)
    blocks = index.transpose(1, 2).reshape(form.panels * form.blocks, -1, 4)
    columns = blocks[:: pattern.v * form.blocks // ROWS, :groups][: pattern.strips(rows)]
    if not isinstance(pattern, Strip):
        columns = columns - torch.arange(groups, device=columns.device)[:, None] * pattern.m
    columns = columns.to(column_type(pattern, cols))[None]
    return SparseLayout(pattern, (1, rows, cols), kept[None], positions, columns, rows=moved)


def _columns(layout: SparseLayout, form: Form) -> Tensor:
    """The column of the weight in every gathered one, [panels][steps][blocks][64] int64."""
    pattern, device = form.pattern, layout.values.device
    groups, slots = pattern.groups(form.cols), form.steps * GROUPS
    starts = torch.arange(slots, device=device)[:, None] * pattern.m
    if isinstance(pattern, NM):
        columns = (starts + torch.arange(4, device=device)).expand(form.panels, slots, 4)
    else:
        assert layout.columns is not None
        columns = layout.columns[0].long()
        if not isinstance(pattern, Strip):
            columns = columns + starts[:groups]
        filling = starts[groups:] if form.window else torch.full_like(starts[groups:], form.cols)
        columns = torch.cat([columns, filling.expand(len(columns), -1, 4)], 1)
        first_rows = torch.arange(form.panels * form.blocks, device=device) * (ROWS // form.blocks)
        columns = columns[(first_rows // pattern.v).clamp(max=len(columns) - 1)]
    return columns.reshape(form.panels, form.blocks, form.steps, 64).transpose(1, 2)


def _window_starts(form: Form, device: torch.device) -> Tensor:
    """The first column of every step's window, [steps][1][1]."""
    return torch.arange(form.steps, device=device)[:, None, None] * (GROUPS * form.window)
