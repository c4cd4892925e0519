"""Values stored as bfloat16: half the bytes, and exactly the result of the same numbers stored as float32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import run
from sparsec.backends.kernel.cpu.stream import check_stream, describe, pack, unpack
from sparsec.layout import SparseLayout, stored_as

PATTERNS = ("1:1", "1:4", "2:4", "1:5", "3:7", "5:9", "1:16", "16:16", "3:17", "7:2:9", "64:2:5", "33:2:40", "48:2:40",
            "32:2:5@strip@moved")  # fmt: skip


def widened(layout: SparseLayout) -> SparseLayout:
    """The same numbers as float32."""
    return dataclasses.replace(layout, values=layout.values.float())


@pytest.mark.parametrize("kernel", ["rows", "tokens"])
@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_residues_give_the_bits_of_float32(make_layout, pattern: str, level: library.Level, kernel: str) -> None:
    m = int(pattern.split("@")[0].split(":")[-1])
    for case in range(24):
        rows, cols, tokens = case * 7 % 83 + 1, case % 4 * m + case * 5 % m + 1, case * 37 % 100 + 1
        layout = stored_as(make_layout(pattern, rows, cols, case), "bf16")
        x, bias = torch.randn(tokens, cols), torch.randn(rows) if case % 2 else None
        expected = run(x, pack(widened(layout)), bias, rows, 1, level, "none", kernel)

        assert torch.equal(expected, run(x, pack(layout), bias, rows, 1, level, "none", kernel))


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", ["2:4", "64:2:5", "1:13", "3:40"])
def test_many_ranges_and_threads_give_the_bits_of_float32(make_layout, pattern: str, level: library.Level) -> None:
    layout = stored_as(make_layout(pattern, 700, 1500, 0), "bf16")
    wide, stream, x = pack(widened(layout)), pack(layout), torch.randn(70, 1500)
    for tokens in (1, 3, 9, 70):
        expected = run(x[:tokens], wide, None, 700, 1, level)
        assert torch.equal(expected, run(x[:tokens], stream, None, 700, 2, level))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unpack_inverts_pack(make_layout, data: st.DataObject) -> None:
    shared = data.draw(st.booleans())
    m = data.draw(st.integers(4 if shared else 1, 256) | st.integers(4 if shared else 1, 17))
    pattern = f"{data.draw(st.integers(1, 70))}:2:{m}" if shared else f"{data.draw(st.integers(1, m))}:{m}"
    rows, cols = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300))
    layout = stored_as(make_layout(pattern, rows, cols, 0), "bf16")
    stream = pack(layout)
    check_stream(stream)
    found = unpack(stream)

    assert describe(stream)[5] == 1
    assert (layout.pattern, layout.shape) == (found.pattern, found.shape)
    assert layout.tensors().keys() == found.tensors().keys()
    for name, table in layout.tensors().items():
        assert torch.equal(table.view(torch.uint8), found.tensors()[name].view(torch.uint8)), name


@pytest.mark.parametrize(("pattern", "share"), [("64:2:5", 0.258), ("64:2:8", 0.162), ("2:4", 0.314), ("2:8", 0.157)])
def test_memory_against_dense_float32(make_layout, pattern: str, share: float) -> None:
    # 2.5 bytes a kept weight, 154 groups of 5 in 768 columns, and the column tables of V:N:M.
    assert pack(stored_as(make_layout(pattern, 768, 768, 0), "bf16")).nbytes <= share * 768 * 768 * 4
