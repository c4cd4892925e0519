"""A stream holds exactly what its layout held, in the bytes it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.backends.kernel.cpu.stream import check_stream, describe, pack, unpack
from sparsec.errors import PatternError
from sparsec.layout import SparseLayout
from sparsec.pattern import Pattern


def assert_same_bits(expected: SparseLayout, found: SparseLayout) -> None:
    assert (expected.pattern, expected.shape) == (found.pattern, found.shape)
    assert expected.tensors().keys() == found.tensors().keys()
    for name, table in expected.tensors().items():
        assert torch.equal(table.view(torch.uint8), found.tensors()[name].view(torch.uint8)), name


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_unpack_inverts_pack(make_layout, data: st.DataObject) -> None:
    shared = data.draw(st.booleans())
    m = data.draw(st.integers(4 if shared else 1, 256) | st.integers(4 if shared else 1, 17))
    pattern = (
        f"{data.draw(st.integers(1, 70) | st.sampled_from((16, 64)))}:2:{m}"
        if shared
        else f"{data.draw(st.integers(1, m))}:{m}"
    )
    if shared and data.draw(st.booleans()):
        pattern = f"{data.draw(st.sampled_from((16, 48)))}:2:{m}@strip{data.draw(st.sampled_from(('', '@moved')))}"
    rows, cols = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300))
    layout = make_layout(pattern, rows, cols, 0)
    stream = pack(layout)

    check_stream(stream)
    assert_same_bits(layout, unpack(stream))


def test_negative_zero_and_denormals_survive(make_layout) -> None:
    layout = make_layout("2:4", 3, 8, 0)
    layout.values[0, 0, 0, 0], layout.values[0, 1, 1, 1] = -0.0, 1e-45

    assert_same_bits(layout, unpack(pack(layout)))


@pytest.mark.parametrize(
    ("pattern", "share"),
    [("64:2:5", 0.462), ("64:2:8", 0.285), ("64:2:5@strip@moved", 0.467), ("2:4", 0.565), ("2:8", 0.283)],
)
def test_memory_against_dense(make_layout, pattern: str, share: float) -> None:
    # 4.5 bytes a kept weight, 154 groups of 5 in 768 columns, and the column tables of V:N:M.
    assert pack(make_layout(pattern, 768, 768, 0)).nbytes <= share * 768 * 768 * 4


def test_header_is_read_back_and_strangers_are_refused(make_layout) -> None:
    stream = pack(make_layout("10:2:20", 37, 50, 0))
    assert describe(stream) == (2, 20, 10, 37, 50, 0, 0, 0)
    assert describe(pack(make_layout("16:2:20@strip@moved", 37, 50, 0))) == (2, 20, 16, 37, 50, 0, 1, 1)
    for stranger in (stream[:-1], stream[:5], torch.zeros(500, dtype=torch.uint8), stream.view(-1).float()):
        with pytest.raises(ValueError, match="made by"):
            describe(stranger)


def test_an_index_outside_its_group_is_found(make_layout) -> None:
    stream = pack(make_layout("2:20", 16, 40, 0))
    stream[128] = 20
    with pytest.raises(ValueError, match="damaged"):
        check_stream(stream)


@pytest.mark.parametrize(
    ("table", "at", "value"),
    [
        ("a column beyond the weight", 128, 50),
        ("a negative column", 128, -1),
        ("a column in the place of a spare one", 128 + 4 * 12, 1),
        ("a row beyond the weight", 320, 37),
        ("a row twice", 320, None),
        ("a spare row", 320 + 4 * 37, 1),
        ("a place of another row", 512, None),
    ],
)
def test_a_damaged_table_of_a_strip_is_found(make_layout, table: str, at: int, value: int | None) -> None:
    # Header 128 bytes; columns: 3 strips of one chunk, 192 bytes; rows and places: 48 numbers each.
    stream = pack(make_layout("16:2:20@strip@moved", 37, 50, 0))
    check_stream(stream)
    numbers = stream.view(torch.int32)
    numbers[at // 4] = numbers[at // 4 + 1] if value is None else value

    with pytest.raises(ValueError, match="damaged"):
        check_stream(stream)


def test_a_table_of_rows_must_be_a_permutation(make_layout) -> None:
    layout = make_layout("16:2:5@strip@moved", 20, 30, 0)
    layout.rows[0, 3] = layout.rows[0, 4]

    with pytest.raises(PatternError, match="names padding"):
        pack(layout)


def test_layouts_without_a_kernel_are_refused(make_layout) -> None:
    layout = make_layout("2:4", 3, 8, 0)
    with pytest.raises(PatternError, match="unstructured"):
        pack(make_layout("unstructured:0.5", 3, 8, 0))
    with pytest.raises(PatternError, match="a strip has a multiple of 16 rows"):
        pack(make_layout("8:2:5@strip", 16, 40, 0))
    with pytest.raises(PatternError, match="float64"):
        pack(SparseLayout(layout.pattern, layout.shape, layout.values.double(), layout.positions))
    with pytest.raises(PatternError, match="out of range"):
        pack(SparseLayout(Pattern.parse("2:3"), (1, 3, 6), layout.values, torch.full_like(layout.positions, 255)))
