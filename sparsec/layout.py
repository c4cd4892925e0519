"""The canonical layout: sparse weights as small tables. The reference that every kernel and backend is tested against.

Law: decompress(compress(weight, pattern, selection)) == where(mask, weight, +0.0), bit for bit.
`stored_as` then rounds the values to the type they are stored in; `decompress` gives exactly the stored numbers.

Tables on disk, for a weight (batch, rows, cols) with groups = ceil(cols / M):
    N:M           positions uint8 (batch, rows, bytes): ceil(log2 M) bits each, N a group, packed along the row
                  values float (batch, rows, groups, N)
    V:N:M         columns uint8 (batch, ceil(rows / V), groups, 4), offset in the group
                  positions uint8 (batch, rows, bytes): 2 bits each, 2 a group
                  values float (batch, rows, groups, 2)
    V:N:M@strip   the same, but columns int16 (batch, ceil(rows / V), groups, 4), column of the weight; int32 where
                  cols > 32768. (Signed, because few tools read uint16.) Where the rows of strips are no neighbours also
                  rows int32 (batch, rows): row i of the other tables is row rows[i] of the weight.
    unstructured  positions uint8 (batch, rows, ceil(cols / 8)), one bit a weight; values float (kept,), row by row
Stored as bf16, values are bfloat16. Stored as int8, they are int8 in -127..127, and one more table goes with them:
                  scales float32 (batch, rows), the weight is value * scale; 0 for a row that keeps only zeros
Bits are filled from the least significant one. Padding slots (see `Selection`) hold the value 0.
Tables of an intersection are those of its first pattern, with 0 in every slot that the second leaves empty.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsec.errors import ArtifactError, PatternError
from sparsec.pattern import NM, Pattern, SharedColumns, Strip, Unstructured, kept_columns
from sparsec.selection import Selection, as_stored, in_place
from sparsec.selection_checks import check_indices

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Values = Literal["fp32", "bf16", "int8"]
"""How stored values are rounded. fp32: not at all; a weight of another type is stored in that type."""
VALUE_BYTES: dict[Values, int] = {"fp32": 4, "bf16": 2, "int8": 1}
TABLES = ("values", "positions", "columns", "scales", "rows")
"""The names of all tables, in their order."""
_INT16_COLUMNS = 1 << 15  # indices below it fit int16
INT8_MAX = 127  # -128 is left out, so that a magnitude fits 7 bits and two products fit 16


@dataclass(frozen=True)
class SparseLayout:
    """A compressed weight: its pattern, dense shape (batch, rows, cols) and tables, as described above."""

    pattern: Pattern
    shape: tuple[int, int, int]
    values: Tensor
    positions: Tensor
    columns: Tensor | None = None
    scales: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tables by the names they are stored under."""
        named = ((name, getattr(self, name)) for name in TABLES)
        return {name: table for name, table in named if table is not None}

    @property
    def stored(self) -> str:
        """What the values are stored as: `fp32`, `bf16`, `int8`, or the name of another type."""
        name = str(self.values.dtype).removeprefix("torch.")
        return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)

    @property
    def nbytes(self) -> int:
        """Bytes of all tables."""
        return sum(table.nbytes for table in self.tensors().values())

    def selection(self) -> Selection:
        """The kept weights, with positions unpacked."""
        fields, bits = _fields(self.pattern, self.shape)
        positions = unpack_bits(self.positions, bits, fields)
        if isinstance(self.pattern, (NM, SharedColumns)):
            positions = positions.unflatten(2, (-1, self.pattern.n))
        columns = self.columns
        if isinstance(self.pattern, Strip) and columns is not None:
            columns = columns.int()
        return Selection(positions, columns, rows=self.rows)


def compress(weight: Tensor, pattern: Pattern, selection: Selection) -> SparseLayout:
    """Gather the kept weights of `weight`, (batch, rows, cols) float, into tables of the pattern's `executable`."""
    import torch

    if not bool(torch.isfinite(weight).all()):
        raise PatternError(f"{pattern}: the weight holds NaN or Inf; repair the checkpoint before making it sparse")
    pattern = pattern.executable
    shape = (weight.shape[0], weight.shape[1], weight.shape[2])
    _, bits = _fields(pattern, shape)
    positions = pack_bits(selection.positions.flatten(2), bits)
    if isinstance(pattern, Unstructured):
        return SparseLayout(pattern, shape, weight[selection.positions.bool()] + 0.0, positions)
    index, padding = kept_columns(pattern, selection, shape[2])
    values = as_stored(weight, selection.rows).gather(2, index.flatten(2)).view(index.shape)
    spare = padding if selection.kept is None else padding | ~selection.kept
    values = values.masked_fill(spare, 0.0) + 0.0  # + 0.0 turns -0.0 into +0.0
    columns = selection.columns
    if columns is not None:
        columns = columns.to(column_type(pattern, shape[2]))
    return SparseLayout(pattern, shape, values, positions, columns, rows=selection.rows)


def column_type(pattern: Pattern, cols: int) -> torch.dtype:
    """What the table `columns` of a pattern holds."""
    import torch

    if not isinstance(pattern, Strip):
        return torch.uint8
    return torch.int16 if cols <= _INT16_COLUMNS else torch.int32


def stored_as(layout: SparseLayout, values: Values) -> SparseLayout:
    """The layout of a floating-point weight with its values rounded to nearest even, to what they are stored as.

    int8: symmetric, by row: scale = (largest kept magnitude) / 127, value = round(weight / scale). Rounding again what
    was rounded changes no value. Raises PatternError where a value is too large for bf16.
    """
    import torch

    if values == "fp32":
        return layout
    if values == "bf16":
        rounded = layout.values.bfloat16() + 0.0
        if not bool(torch.isfinite(rounded).all()):
            raise PatternError(f"{layout.pattern}: a weight is beyond the range of bf16; store the values as fp32")
        return dataclasses.replace(layout, values=rounded)
    batch, rows, _ = layout.shape
    weights = layout.values.float()
    row = _row_of_values(layout)
    largest = torch.zeros(batch * rows, device=weights.device)
    largest.scatter_reduce_(0, row.expand_as(weights).flatten(), weights.abs().flatten(), "amax")
    scales = largest / INT8_MAX
    quotient = weights / torch.where(scales > 0, scales, 1.0)[row]
    # Clamped, because a scale so small that it is denormal may be rounded down to half of what it stands for.
    rounded = quotient.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
    return dataclasses.replace(layout, values=rounded, scales=scales.view(batch, rows))


def _row_of_values(layout: SparseLayout) -> Tensor:
    """Which of the batch * rows rows every value belongs to, int64; for N:M and V:N:M, its last two axes are 1."""
    import torch

    batch, rows, _ = layout.shape
    if isinstance(layout.pattern, Unstructured):
        kept = layout.selection().positions.flatten(0, 1)
        return kept.nonzero()[:, 0]
    return torch.arange(batch * rows, device=layout.values.device).view(batch, rows, 1, 1)


def decompress(layout: SparseLayout, dtype: torch.dtype | None = None) -> Tensor:
    """The dense weight (batch, rows, cols), with +0.0 wherever nothing is kept.

    In the type of the values, float32 for int8, or in `dtype`.
    """
    import torch

    selection, pattern, values = layout.selection(), layout.pattern, layout.values
    if layout.scales is not None:
        values = values * layout.scales.flatten()[_row_of_values(layout)] + 0.0
    values = values.to(dtype or values.dtype)
    weight = torch.zeros(layout.shape, dtype=values.dtype, device=values.device)
    if isinstance(pattern, Unstructured):
        weight[selection.positions.bool()] = values
        return weight
    index, padding = kept_columns(pattern, selection, layout.shape[2])
    # A padding slot names a column that is kept too: its 0 must be added, not stored over the real value.
    stored = weight.scatter_add_(2, index.flatten(2), values.masked_fill(padding, 0.0).flatten(2))
    return in_place(stored, layout.rows)


def validate(layout: SparseLayout, where: str) -> None:
    """Raise ArtifactError unless every table has the right type, shape and index range. `where` names the site.

    Native code reads these tables unchecked: nothing may reach it that did not pass here.
    """
    import torch

    pattern, (batch, rows, cols) = layout.pattern, layout.shape
    if pattern != pattern.executable:
        raise ArtifactError(f"{where}: tables are of one pattern, such as {pattern.executable}; found {pattern}")
    fields, bits = _fields(pattern, layout.shape)
    expected: dict[str, tuple[int, ...]] = {"positions": (batch, rows, (fields * bits + 7) // 8)}
    if isinstance(pattern, (NM, SharedColumns)):
        expected["values"] = (batch, rows, pattern.groups(cols), pattern.n)
    if isinstance(pattern, SharedColumns):
        expected["columns"] = (batch, pattern.strips(rows), pattern.groups(cols), 4)
    if layout.values.dtype == torch.int8:
        expected["scales"] = (batch, rows)
    if layout.rows is not None and not isinstance(pattern, Strip):
        raise ArtifactError(f"{where}: a table of rows belongs to strips; {pattern} has none")
    if layout.rows is not None:
        expected["rows"] = (batch, rows)
    for name, shape in expected.items():
        table = layout.tensors().get(name)
        if table is None or tuple(table.shape) != shape:
            found = "nothing" if table is None else str(tuple(table.shape))
            raise ArtifactError(f"{where}: table {name} of {pattern} must have shape {shape}, found {found}")
        integers = {"positions": torch.uint8, "columns": column_type(pattern, cols), "rows": torch.int32}
        if name in integers and table.dtype != integers[name]:
            wanted = str(integers[name]).removeprefix("torch.")
            raise ArtifactError(f"{where}: table {name} must be {wanted}, found {table.dtype}")
    _validate_values(layout, where)
    selection = layout.selection()
    if isinstance(pattern, Unstructured):
        if layout.values.shape != (int(selection.positions.sum()),):
            raise ArtifactError(f"{where}: {tuple(layout.values.shape)} values do not match the bits that are set")
        return
    check_indices(pattern, selection, layout.shape, where)
    _, padding = kept_columns(pattern, selection, cols)
    if bool((layout.values[padding] != 0).any()):
        raise ArtifactError(f"{where}: a padding slot holds a value other than 0")


def _validate_values(layout: SparseLayout, where: str) -> None:
    import torch

    values, scales = layout.values, layout.scales
    if scales is None:
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise ArtifactError(f"{where}: the values must be finite floating-point numbers")
        return
    if values.dtype != torch.int8 or bool((values < -INT8_MAX).any()):
        raise ArtifactError(f"{where}: values that have scales must be int8 in -{INT8_MAX}..{INT8_MAX}")
    if scales.dtype != torch.float32 or not bool(((scales >= 0) & scales.isfinite()).all()):
        raise ArtifactError(f"{where}: the scales must be finite float32 numbers, 0 or more")


def table_bytes(pattern: Pattern, shape: tuple[int, int, int], value_bytes: int = 4, moved: bool = False) -> int:
    """Bytes of all tables of a weight of this shape, without building them. One byte a value is int8, with scales.

    moved: with a table of rows.
    """
    batch, rows, cols = shape
    pattern = pattern.executable
    fields, bits = _fields(pattern, shape)
    others = batch * rows * ((fields * bits + 7) // 8 + (4 if moved else 0))
    if value_bytes == VALUE_BYTES["int8"]:
        others += 4 * batch * rows
    if isinstance(pattern, Unstructured):
        return others + value_bytes * batch * pattern.kept(rows, cols)
    assert isinstance(pattern, (NM, SharedColumns))
    if isinstance(pattern, SharedColumns):
        others += batch * pattern.strips(rows) * pattern.groups(cols) * 4 * column_type(pattern, cols).itemsize
    return others + value_bytes * batch * rows * pattern.groups(cols) * pattern.n


def _fields(pattern: Pattern, shape: tuple[int, int, int]) -> tuple[int, int]:
    """How many positions a row has, and the bits of each."""
    if isinstance(pattern, Unstructured):
        return shape[2], 1
    if isinstance(pattern, SharedColumns):
        return pattern.groups(shape[2]) * pattern.n, 2
    if isinstance(pattern, NM):
        return pattern.groups(shape[2]) * pattern.n, (pattern.m - 1).bit_length()
    raise PatternError(f"{pattern} is not stored sparse")


def pack_bits(fields: Tensor, bits: int) -> Tensor:
    """(..., count) uint8 below 2**bits -> (..., ceil(count * bits / 8)) uint8, least significant bit first."""
    import torch

    planes = torch.stack([(fields >> b) & 1 for b in range(bits)], -1) if bits else fields[..., :0, None]
    stream = planes.flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).unflatten(-1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=fields.device)
    packed: Tensor = (stream << shifts).sum(-1, dtype=torch.uint8)
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: (..., bytes) -> (..., count) uint8."""
    import torch

    if not bits:
        return torch.zeros(*packed.shape[:-1], count, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[..., None] >> shifts) & 1).flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    fields: Tensor = (stream << shifts[:bits]).sum(-1, dtype=torch.uint8)
    return fields
