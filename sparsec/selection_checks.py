"""What must hold of a selection before anything relies on it: types, shapes, index ranges, orders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec.errors import ArtifactError
from sparsec.intersection import Intersection
from sparsec.pattern import NM, Pattern, SharedColumns, Strip, Unstructured, kept_columns
from sparsec.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor


def check_selection(pattern: Pattern, selection: Selection, shape: tuple[int, int, int], where: str) -> None:
    """Raise ArtifactError unless a selection has the types, shapes and index ranges that `Selection` says."""
    import torch

    batch, rows, cols = shape
    stated, pattern = pattern, pattern.executable
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if isinstance(pattern, (NM, SharedColumns)):
        expected["positions"] = (batch, rows, pattern.groups(cols), pattern.n), torch.uint8
    else:
        expected["positions"] = shape, torch.uint8
    if isinstance(pattern, SharedColumns):
        kind = torch.int32 if isinstance(pattern, Strip) else torch.uint8
        expected["columns"] = (batch, pattern.strips(rows), pattern.groups(cols), 4), kind
    if selection.rows is not None and isinstance(pattern, Strip):
        expected["rows"] = (batch, rows), torch.int32
    if isinstance(stated, Intersection):
        expected["kept"] = expected["positions"][0], torch.bool
    found = {name: (tuple(table.shape), table.dtype) for name, table in selection.tensors().items()}
    if found != expected:
        raise ArtifactError(f"{where}: a selection of {stated} must hold {expected}, found {found}")
    if not isinstance(pattern, Unstructured):
        check_indices(pattern, selection, shape, where)
    if isinstance(stated, Intersection):
        _check_kept(stated, selection, cols, where)


def _check_kept(pattern: Intersection, selection: Selection, cols: int, where: str) -> None:
    assert selection.kept is not None
    _, padding = kept_columns(pattern.first, selection, cols)
    if bool((selection.kept & padding).any()):
        raise ArtifactError(f"{where}: a padding slot is marked as kept")
    if broken := pattern.second.violations(pattern.mask(selection, cols)).first:
        raise ArtifactError(f"{where}: the kept slots of {pattern} break {pattern.second}: {broken[0]}")


def check_indices(pattern: Pattern, selection: Selection, shape: tuple[int, int, int], where: str) -> None:
    """Raise ArtifactError unless positions and columns, of the right shapes, are in range and in their order."""
    positions, cols = selection.positions.short(), shape[2]
    slots = 4 if isinstance(pattern, SharedColumns) else pattern.m  # type: ignore[attr-defined]
    if bool((positions >= slots).any()) or bool((positions.diff(dim=3) <= 0).any()):
        raise ArtifactError(f"{where}: positions must be ascending and below {slots}")
    if selection.rows is not None:
        assert isinstance(pattern, Strip)
        check_rows(selection.rows, pattern.v, where)
    if isinstance(pattern, SharedColumns):
        _check_columns(selection, pattern, cols, where)
        if bool((positions[:, :, -1] >= max(pattern.real_slots(cols), pattern.n)).any()):
            raise ArtifactError(f"{where}: a position of the tail group names padding though real columns are left")


def check_rows(rows: Tensor, v: int, where: str) -> None:
    """A permutation of all rows, ascending in each strip."""
    import torch

    every = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device)
    if not torch.equal(rows.sort(1).values, every.expand_as(rows)):
        raise ArtifactError(f"{where}: the table of rows must name each of 0 to {rows.shape[1] - 1} once")
    if any(bool((strip.diff(dim=1) < 0).any()) for strip in rows.split(v, 1)):
        raise ArtifactError(f"{where}: the rows of a strip must be ascending in the table of rows")


def _check_columns(selection: Selection, pattern: SharedColumns, cols: int, where: str) -> None:
    assert selection.columns is not None
    columns, real = selection.columns.int(), pattern.real_slots(cols)
    if isinstance(pattern, Strip):
        in_range, rule = bool(((columns >= 0) & (columns < cols)).all()), f"columns must be below {cols}"
    else:
        tail = cols - (pattern.groups(cols) - 1) * pattern.m
        in_range = bool((columns < pattern.m).all()) and bool((columns[:, :, -1] < tail).all())
        rule = f"offsets must be below {pattern.m} (tail {tail})"
    if not in_range:
        raise ArtifactError(f"{where}: a column index is out of range: {rule}")
    # Those that are left in the tail of a window are all kept, so its last one is its last column.
    padded_ok = bool((columns[:, :, -1, real:] == columns[:, :, -1, real - 1 : real]).all())
    ascending = bool((columns[:, :, :-1].diff(dim=3) > 0).all()) and bool(
        (columns[:, :, -1, :real].diff(dim=2) > 0).all()
    )
    if not (ascending and padded_ok):
        raise ArtifactError(f"{where}: the columns of a block must be ascending")
    if isinstance(pattern, Strip):
        _check_strip_groups(selection, pattern, cols, where)


def _check_strip_groups(selection: Selection, pattern: Strip, cols: int, where: str) -> None:
    assert selection.columns is not None
    if bool(pattern.shared_twice(selection, cols).any()):
        raise ArtifactError(f"{where}: a column is in two groups of a strip")
    ordered = selection.columns[:, :, : -1 if pattern.real_slots(cols) < 4 else None, 0]
    if bool((ordered.diff(dim=2) <= 0).any()):
        raise ArtifactError(f"{where}: the groups of a strip must be in the order of their first columns")
