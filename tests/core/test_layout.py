"""The tables hold exactly the kept weights, have the bytes they promise, and damage is found before they are used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random
from strategies import moved_selections, shapes, sparse_patterns, strip_patterns, weights
from torch import Tensor

from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import SparseLayout, compress, decompress, pack_bits, table_bytes, unpack_bits, validate
from sparsec.pattern import NM, Dense, Pattern, SharedColumns, Strip, Unstructured


def compressed(text: str, shape: tuple[int, int, int] = (1, 3, 8), seed: int = 0) -> SparseLayout:
    pattern, weight = Pattern.parse(text), random(*shape, seed=seed)
    return compress(weight, pattern, pattern.project(weight.abs()))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


# The law --------------------------------------------------------------------------------------------------------------


@given(pattern=sparse_patterns(), data=st.data())
def test_decompress_gives_the_masked_weight_bit_for_bit(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = pattern.project(weight.abs())
    layout = compress(weight, pattern, selection)

    expected = torch.where(pattern.mask(selection, weight.shape[2]), weight, 0.0) + 0.0
    assert torch.equal(bits(expected), bits(decompress(layout)))
    assert table_bytes(pattern, layout.shape) == layout.nbytes
    validate(layout, "site")


@given(pattern=sparse_patterns(), data=st.data())
def test_the_law_holds_for_a_selection_that_ignores_the_weight(pattern: Pattern, data: st.DataObject) -> None:
    shape = data.draw(shapes())
    weight, score = data.draw(weights(shape)), data.draw(weights(shape)).abs()
    selection = pattern.project(score)
    layout = compress(weight, pattern, selection)

    mask = pattern.mask(selection, shape[2])
    assert torch.equal(bits(torch.where(mask, weight, 0.0) + 0.0), bits(decompress(layout)))
    stored = pattern.mask(layout.selection(), shape[2])  # of an intersection: every slot that its first pattern has
    assert torch.equal(pattern.executable.mask(selection, shape[2]), stored)


@settings(max_examples=30, deadline=None)
@given(pattern=strip_patterns(), data=st.data())
def test_the_law_holds_where_rows_moved(pattern: Strip, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = data.draw(moved_selections(pattern, weight.abs()))
    layout = compress(weight, pattern, selection)
    validate(layout, "w")

    masked = torch.where(pattern.mask(selection, weight.shape[2]), weight, 0.0) + 0.0
    assert torch.equal(bits(decompress(layout)), bits(masked))
    assert table_bytes(pattern, layout.shape, moved=True) == layout.nbytes
    assert layout.selection().rows is selection.rows


@pytest.mark.parametrize("text", ["2:4", "2:2:5", "2:2:5@strip", "unstructured:0.5"])
def test_a_negative_zero_is_stored_as_zero(text: str) -> None:
    pattern, weight = Pattern.parse(text), torch.full((1, 2, 11), -0.0)
    layout = compress(weight, pattern, pattern.project(weight.abs()))

    assert not torch.signbit(layout.values).any()
    assert not torch.signbit(decompress(layout)).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("text", ["2:4", "2:2:5", "unstructured:0.5"])
def test_values_keep_their_type(text: str, dtype: torch.dtype) -> None:
    pattern, weight = Pattern.parse(text), random(2, 5, 11).to(dtype)
    selection = pattern.project(weight.abs())
    layout = compress(weight, pattern, selection)

    assert dtype == layout.values.dtype
    assert torch.equal(torch.where(pattern.mask(selection, 11), weight, 0.0), decompress(layout))
    assert table_bytes(pattern, (2, 5, 11), weight.element_size()) == layout.nbytes


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    pattern, weight = NM(2, 4), torch.ones(1, 2, 8)
    weight[0, 1, 7] = value  # not even kept

    with pytest.raises(PatternError, match="NaN or Inf"):
        compress(weight, pattern, pattern.project(torch.ones(2, 8)))


def test_dense_is_not_stored_sparse() -> None:
    with pytest.raises(PatternError, match="not stored sparse"):
        table_bytes(Dense(), (1, 2, 4))


# Tables ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shapes_of"),
    [
        ("2:4", {"values": (2, 7, 3, 2), "positions": (2, 7, 2)}),  # 6 fields of 2 bits
        ("3:5", {"values": (2, 7, 3, 3), "positions": (2, 7, 4)}),  # 9 fields of 3 bits
        ("3:2:5", {"values": (2, 7, 3, 2), "positions": (2, 7, 2), "columns": (2, 3, 3, 4)}),
        ("3:2:5@strip", {"values": (2, 7, 3, 2), "positions": (2, 7, 2), "columns": (2, 3, 3, 4)}),
        ("unstructured:0.5", {"values": (76,), "positions": (2, 7, 2)}),
    ],
)
def test_tables_have_the_documented_shapes_and_types(text: str, shapes_of: dict[str, tuple[int, ...]]) -> None:
    tables = compressed(text, (2, 7, 11)).tensors()

    assert shapes_of == {name: tuple(table.shape) for name, table in tables.items()}
    columns = torch.int16 if text.endswith("@strip") else torch.uint8
    types = {"positions": torch.uint8, "columns": columns, "values": torch.float32}
    assert types == types | {name: table.dtype for name, table in tables.items()}


@pytest.mark.parametrize(("cols", "dtype"), [(32768, torch.int16), (32769, torch.int32)])
def test_columns_of_a_strip_take_four_bytes_only_where_two_are_too_few(cols: int, dtype: torch.dtype) -> None:
    pattern, weight = Strip(2, 2, 256), torch.zeros(1, 1, cols)
    weight[0, 0, -1] = 1.0
    layout = compress(weight, pattern, pattern.project(weight, "l1"))
    validate(layout, "site")

    assert layout.columns is not None
    assert dtype == layout.columns.dtype
    assert cols - 1 == int(layout.columns.max())
    assert table_bytes(pattern, (1, 1, cols)) == layout.nbytes
    assert torch.equal(weight, decompress(layout))


@pytest.mark.parametrize(
    ("text", "ratio"), [("64:2:5", 0.429), ("64:2:8", 0.268), ("64:2:8@strip", 0.27), ("2:4", 0.531)]
)
def test_a_large_weight_shrinks_as_documented(text: str, ratio: float) -> None:
    assert ratio == round(table_bytes(Pattern.parse(text), (1, 3072, 768)) / (4 * 3072 * 768), 3)


def test_positions_fill_bytes_from_the_least_significant_bit() -> None:
    weight = torch.tensor([[[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 4.0, 0.0]]])
    layout = compress(weight, NM(2, 4), NM(2, 4).project(weight))

    low_nibble, high_nibble = 1 | 3 << 2, 0 | 2 << 2  # positions (1, 3) of group 0, then (0, 2) of group 1
    assert [[[low_nibble | high_nibble << 4]]] == layout.positions.tolist()
    assert [1.0, 2.0, 3.0, 4.0] == layout.values.flatten().tolist()


def test_a_mask_of_bits_fills_bytes_from_the_least_significant_bit() -> None:
    weight = torch.tensor([[[1.0, 0, 0, 0, 0, 0, 0, 2.0, 3.0]]])
    pattern = Unstructured(2 / 3)

    assert [[[0b10000001, 0b1]]] == compress(weight, pattern, pattern.project(weight)).positions.tolist()


@given(width=st.integers(0, 8), data=st.data())
def test_unpacking_inverts_packing(width: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 40))
    fields = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count)), dtype=torch.uint8
    )[None]
    packed = pack_bits(fields, width)

    assert (1, (count * width + 7) // 8) == tuple(packed.shape)
    assert torch.equal(fields, unpack_bits(packed, width, count))


# Damage ---------------------------------------------------------------------------------------------------------------

Damage = Callable[[SparseLayout], SparseLayout]


def with_table(name: str, change: Callable[[Tensor], Tensor]) -> Damage:
    def damage(layout: SparseLayout) -> SparseLayout:
        return dataclasses.replace(layout, **{name: change(layout.tensors()[name].clone())})

    return damage


def with_rows(change: Callable[[Tensor], Tensor]) -> Damage:
    """A table of rows that would be right but for `change`."""
    return lambda layout: dataclasses.replace(layout, rows=change(torch.arange(3, dtype=torch.int32)[None]))


def at(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(table: Tensor) -> Tensor:
        table[index] = value
        return table

    return change


DAMAGE: dict[str, tuple[str, Damage, str]] = {
    "positions of another type": ("2:4", with_table("positions", lambda t: t.to(torch.int8)), "must be uint8"),
    "positions of another shape": ("2:4", with_table("positions", lambda t: t[..., :0]), "positions .* shape"),
    "positions of another rank": ("2:4", with_table("positions", lambda t: t.flatten()), "positions .* shape"),
    "positions equal": ("2:4", with_table("positions", at((0, 0, 0), 0b0101)), "positions must be ascending"),
    "positions descending": ("2:4", with_table("positions", at((0, 0, 0), 0b0011)), "positions must be ascending"),
    "position beyond M": ("1:5", with_table("positions", at((0, 0, 0), 0b101)), "below 5"),
    "positions of the tail descending": ("3:2:5", with_table("positions", at((0, 0, 0), 0b0111_0100)), "ascending"),
    "values missing a group": ("2:4", with_table("values", lambda t: t[:, :, :1]), "values .* must have shape"),
    "values of integers": ("2:4", with_table("values", lambda t: t.int()), "values must be finite floating-point"),
    "value NaN": ("2:4", with_table("values", at((0, 0, 0, 0), float("nan"))), "values must be finite"),
    "value Inf": ("3:2:5", with_table("values", at((0, 0, 0, 0), float("inf"))), "values must be finite"),
    "columns missing": ("3:2:5", lambda layout: dataclasses.replace(layout, columns=None), "columns .* found nothing"),
    "columns of another type": ("3:2:5", with_table("columns", lambda t: t.int()), "columns must be uint8"),
    "columns of another shape": ("3:2:5", with_table("columns", lambda t: t[:, :, :, :3]), "columns .* shape"),
    "column beyond M": ("3:2:5", with_table("columns", at((0, 0, 0, 3), 5)), "out of range"),
    "column beyond the weight": ("3:2:5", with_table("columns", at((0, 0, 1, 3), 3)), "out of range"),
    "columns equal": ("3:2:5", with_table("columns", at((0, 0, 0), 1)), "must be ascending"),
    "columns of the tail equal": ("3:2:5", with_table("columns", at((0, 0, 1, slice(0, 2)), 2)), "must be ascending"),
    "padding column that is not the last": ("3:2:5", with_table("columns", at((0, 0, 1, 3), 0)), "must be ascending"),
    "strip columns missing": (
        "3:2:5@strip", lambda layout: dataclasses.replace(layout, columns=None), "columns .* found nothing"),
    "strip columns of bytes": ("3:2:5@strip", with_table("columns", lambda t: t.byte()), "columns must be int16"),
    "strip column beyond the weight": ("3:2:5@strip", with_table("columns", at((0, 0, 0, 3), 8)), "out of range"),
    "strip column negative": ("3:2:5@strip", with_table("columns", at((0, 0, 0, 0), -1)), "out of range"),
    "strip columns descending": ("3:2:5@strip", with_table("columns", lambda t: t.flip(3)), "must be ascending"),
    "strip columns equal": ("3:2:5@strip", with_table("columns", at((0, 0, 0), 1)), "must be ascending"),
    "rows of a window": ("3:2:5", with_rows(lambda t: t), "belongs to strips"),
    "rows of another type": ("3:2:5@strip", with_rows(lambda t: t.long()), "rows must be int32"),
    "too few rows": ("3:2:5@strip", with_rows(lambda t: t[:, 1:]), r"rows .* shape \(1, 3\)"),
    "a row twice": ("3:2:5@strip", with_rows(lambda t: t * 0), "name each of 0 to 2 once"),
    "a row beyond": ("3:2:5@strip", with_rows(lambda t: t + 1), "name each of 0 to 2 once"),
    "rows descending": ("3:2:5@strip", with_rows(lambda t: t.flip(1)), "must be ascending"),
    "strip groups swapped": ("3:2:5@strip", with_table("columns", lambda t: t.flip(2)), "order of their first columns"),
    "strip column in two groups": (
        "3:2:5@strip", with_table("columns", lambda t: t[:, :, :1].expand(-1, -1, 2, -1)), "column is in two groups"),
    "bits that no value belongs to": ("unstructured:0.5", with_table("positions", at((0, 0, 0), 255)), "do not match"),
    "too few values": ("unstructured:0.5", with_table("values", lambda t: t[:-1]), "do not match"),
    "values as a matrix": ("unstructured:0.5", with_table("values", lambda t: t[None]), "do not match"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_by_name(text: str, damage: Damage, message: str) -> None:
    layout = compressed(text)
    validate(layout, "encoder.fc1")

    with pytest.raises(ArtifactError, match=f"^encoder.fc1: .*{message}"):
        validate(damage(layout), "encoder.fc1")


@pytest.mark.parametrize(("text", "cols"), [("2:4", 5), ("3:2:5", 6), ("3:4", 6), ("3:2:4@strip", 5)])
def test_a_padding_slot_may_hold_no_value(text: str, cols: int) -> None:
    layout = compressed(text, (1, 3, cols))
    layout.values[0, 0, -1, -1] = 1.0

    with pytest.raises(ArtifactError, match="padding"):
        validate(layout, "site")


@given(data=st.data())
def test_no_damaged_byte_reaches_outside_the_weight(data: st.DataObject) -> None:
    """Whatever the bytes are: refused, or every column it names lies in the weight."""
    layout = compressed(
        data.draw(st.sampled_from(["2:4", "1:5", "2:2:5", "2:2:7", "2:2:5@strip"])),
        (1, 3, data.draw(st.integers(1, 12))),
    )
    name = data.draw(st.sampled_from(sorted(layout.tensors().keys() - {"values"})))
    flat = layout.tensors()[name].view(-1)
    limits = torch.iinfo(flat.dtype)
    flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(limits.min, limits.max))
    try:
        validate(layout, "site")
    except ArtifactError:
        return

    pattern = layout.pattern
    assert isinstance(pattern, (NM, SharedColumns))
    weight = decompress(layout)
    assert torch.isfinite(weight).all()
    assert int((weight != 0).sum()) <= int((layout.values != 0).sum())


def test_a_layout_is_found_whole_after_it_went_through_its_tables() -> None:
    layout = compressed("2:2:5", (2, 5, 13))
    again = SparseLayout(layout.pattern, layout.shape, **layout.tensors())

    assert torch.equal(decompress(layout), decompress(again))
