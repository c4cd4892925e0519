"""Which weights a pattern keeps, as tables of columns and positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Selection:
    """The kept weights of one (batch, rows, cols) weight. The mask follows from it: `pattern.mask(selection, cols)`.

    `positions`, uint8:
        N:M            (batch, rows, groups, N)  offset in the group, strictly ascending
        V:N:M          (batch, rows, groups, 2)  which 2 of the 4 columns of the block, strictly ascending
        unstructured   (batch, rows, cols)       1 where the weight is kept
        V:N:M@strip    the same, of the 4 columns of a group of the strip
    `columns`, (batch, strips, groups, 4), ascending in a group:
        V:N:M          uint8, offset in the group's window
        V:N:M@strip    int32, column of the weight; groups are ordered by their first column, and no column is in two

    In a tail group with fewer real columns than slots, the spare slots are padding: they stand for the group's
    last real column, which is always kept, and carry the value 0. It is the last group of a row, for strips too.

    Of an intersection, the tables are those of its first pattern, and a row may keep fewer than N of a group:
    `kept`, bool, (batch, rows, groups, N), is false where a slot is spare, padding included; None: all are kept.

    `rows`, int32, (batch, rows), of strips whose rows are not V neighbours each: row i of the other tables, which is in
    strip i // V, is row `rows[i]` of the weight; ascending in a strip. None: every row is where it stands.
    """

    positions: Tensor
    columns: Tensor | None = None
    kept: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tables by name, as they are stored."""
        tables = {"positions": self.positions, "columns": self.columns, "kept": self.kept, "rows": self.rows}
        return {name: table for name, table in tables.items() if table is not None}

    @staticmethod
    def of(tables: Mapping[str, Tensor], prefix: str = "") -> Selection:
        """The inverse of `tensors`, of tables whose names may begin with `prefix`; KeyError without positions."""
        others = (tables.get(f"{prefix}{name}") for name in ("columns", "kept", "rows"))
        return Selection(tables[f"{prefix}positions"], *others)


def as_stored(weight: Tensor, rows: Tensor | None) -> Tensor:
    """A weight (batch, rows, cols) with its rows in the order of the tables: see `Selection.rows`."""
    return weight if rows is None else weight.gather(1, rows.long()[:, :, None].expand_as(weight))


def in_place(stored: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `as_stored`."""
    import torch

    if rows is None:
        return stored
    return torch.empty_like(stored).scatter_(1, rows.long()[:, :, None].expand_as(stored), stored)


def kept_only(weight: Tensor, mask: Tensor) -> Tensor:
    """`where(mask, weight, +0.0)` for a mask of the weight's shape, by the bits: NaN goes, a kept -0.0 stays."""
    import torch

    word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return mask.to(word).neg_().bitwise_and_(weight.view(word)).view(weight.dtype)
