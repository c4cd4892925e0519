"""Which weights a pattern keeps, as tables of columns and positions."""

from __future__ import annotations

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
    `columns`, uint8, V:N:M only: (batch, strips, groups, 4) offset in the group, ascending.

    In a tail group with fewer real columns than slots, the spare slots are padding: they stand for the group's
    last real column, which is always kept, and carry the value 0.
    """

    positions: Tensor
    columns: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The tables by name, as they are stored."""
        tables = {"positions": self.positions}
        return tables if self.columns is None else {**tables, "columns": self.columns}
