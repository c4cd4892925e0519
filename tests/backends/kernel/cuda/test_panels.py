"""Panels hold exactly what their layout held, in the order that the sparse tensor cores read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native import mma_sp
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsec.backends.kernel.cuda.panels import Form, form_of, no_panels, pack, unpack
from sparsec.errors import PatternError
from sparsec.layout import decompress, validate
from sparsec.pattern import Pattern

V = st.sampled_from((16, 32, 48, 64, 96, 128, 192))
M = st.integers(4, 17) | st.sampled_from((31, 256))
PATTERNS = st.one_of(
    st.just("2:4"),
    st.builds("{}:2:{}".format, V, M),
    st.builds("{}:2:{}@strip{}".format, V, M, st.sampled_from(("", "@moved"))),
)


@settings(max_examples=80, deadline=None)
@given(PATTERNS, st.integers(1, 200), st.integers(1, 300), st.sampled_from((torch.bfloat16, torch.float16)))
def test_unpack_inverts_pack(make_layout, pattern: str, rows: int, cols: int, dtype: torch.dtype) -> None:
    layout = make_layout(pattern, rows, cols, dtype)
    again = unpack(pack(layout, dtype), layout.pattern, rows, cols, dtype)

    validate(again, "again")
    assert layout.tensors().keys() == again.tensors().keys()
    for name, table in layout.tensors().items():
        assert torch.equal(table.view(torch.uint8), again.tensors()[name].view(torch.uint8)), name


def product(buffer: Tensor, form: Form, x: Tensor) -> Tensor:
    """x (8, cols) times the weight, by `mma_sp` on the tables as the format describes them."""
    tables = form.tables(buffer)
    values = tables["values"].view(torch.bfloat16).view(form.panels, form.steps, 2, 4, 32, 8)
    metadata = tables["metadata"].view(torch.int32).view(form.panels, form.steps, 32, 4).long() & 0xFFFFFFFF
    index = tables["index"].view(form.panels, form.steps, form.blocks, 64).long()
    start = torch.arange(form.steps)[:, None, None] * 16 * form.window
    columns = index + start
    x = torch.nn.functional.pad(x.double(), (0, int(columns.max()) + 1))  # beyond the weight are zeros
    y = torch.zeros(form.panels * 64, 8).double()
    for panel in range(form.panels):
        for tile in range(4):
            sums = torch.zeros(32, 4).double()
            for step, half in ((step, half) for step in range(form.steps) for half in (0, 1)):
                gathered = x[:, columns[panel, step, tile * form.blocks // 4]][:, 32 * half : 32 * half + 32].T
                b = torch.stack([gathered[mma_sp.b_at(i)] for i in range(8)], 1)
                a = values[panel, step, half, tile]
                sums = mma_sp.mma_sp(a, b, sums, metadata[panel, step, :, tile], half)
            for i in range(4):
                row, n = mma_sp.c_at(i)
                y[64 * panel + 16 * tile + row, n] = sums[:, i]
    if not form.moved:
        return y[: form.rows].T
    kept = tables["rows"] >= 0
    return torch.empty(form.rows, 8).double().index_copy_(0, tables["rows"][kept].long(), y[kept]).T


@pytest.mark.parametrize(
    ("pattern", "rows", "cols"),
    [
        ("2:4", 64, 64), ("64:2:5", 70, 97), ("64:2:8", 128, 256), ("128:2:8", 130, 129), ("64:2:16", 64, 300),
        ("48:2:6", 100, 50), ("16:2:9", 64, 33), ("64:2:20", 64, 401), ("32:2:7@strip", 90, 200),
        ("64:2:5@strip@moved", 140, 111),
    ],
)  # fmt: skip
def test_the_tensor_cores_multiply_by_the_weight(make_layout, pattern: str, rows: int, cols: int) -> None:
    layout = make_layout(pattern, rows, cols)
    buffer, x = pack(layout, torch.bfloat16), torch.randn(8, cols).double()
    found = product(buffer, form_of(buffer, layout.pattern, rows, cols), x)

    expected = x @ decompress(layout, torch.float64)[0].T
    assert torch.allclose(expected, found, rtol=1e-12, atol=1e-12)


def test_metadata_is_that_of_torch_word_for_word(make_layout) -> None:
    rows, cols = 128, 256
    layout = make_layout("2:4", rows, cols)
    values, theirs = sparse_semi_structured_from_dense_cutlass(decompress(layout)[0])
    # torch's order, which is CUTLASS's: words of [32 columns][32 rows][lane]; the selector is which 16 rows of 32.
    words = theirs.contiguous().view(torch.int32).view(cols // 32, rows // 32, 8, 2, 2)
    by_tile = words.permute(1, 3, 0, 2, 4)  # pair of tiles, tile, half step, g, k
    form = Form(layout.pattern, rows, cols)
    ours = form.tables(pack(layout, torch.bfloat16))["metadata"].view(torch.int32).view(2, form.steps, 8, 2, 2, 4)
    ours = ours.permute(0, 5, 1, 3, 2, 4)  # panel, tile, step, half, g, k

    assert torch.equal(by_tile.reshape(-1), ours.reshape(-1))
    assert torch.equal(values, layout.values.view(rows, cols // 2))


def test_undefined_and_unordered_metadata_is_refused_by_the_emulation() -> None:
    for nibbles in (0x00000000, 0x44444441, 0x4444444F):
        with pytest.raises(ValueError, match="not ordered"):
            mma_sp.kept_columns(torch.full((32,), nibbles), 0)


def test_slots_that_fill_a_step_name_columns_beyond_the_weight(make_layout) -> None:
    for pattern, cols in (("64:2:5", 81), ("64:2:5@strip", 81), ("64:2:20", 100), ("2:4", 10)):
        layout = make_layout(pattern, 64, cols)
        form = Form(layout.pattern, 64, cols)
        index = form.tables(pack(layout, torch.bfloat16))["index"].view(form.steps, 64).long()
        columns = index + torch.arange(form.steps)[:, None] * 16 * form.window

        assert bool((columns.flatten()[4 * layout.pattern.groups(cols) :] >= cols).all()), pattern


def test_bytes_against_a_dense_weight() -> None:
    shares = {"2:4": 0.571, "64:2:5": 0.463, "64:2:8": 0.285, "64:2:16": 0.143, "16:2:8": 0.297, "64:2:8@strip": 0.297}
    for text, share in shares.items():
        form = Form(Pattern.parse(text), 4096, 4096)

        assert math.isclose(form.nbytes, share * 2 * 4096 * 4096, rel_tol=0.005), text


def test_what_has_no_panels_is_named(make_layout) -> None:
    assert "multiple of 16" in no_panels(Pattern.parse("24:2:8"))
    assert "2:4" in no_panels(Pattern.parse("1:4"))
    with pytest.raises(PatternError, match="share columns"):
        pack(make_layout("2:8", 16, 32), torch.bfloat16)
    layout = make_layout("2:4", 16, 32, torch.float32)
    layout.values[0, 3, 1, 1] = 7e4
    with pytest.raises(PatternError, match=r"beyond the range of torch.float16"):
        pack(layout, torch.float16)
    with pytest.raises(ValueError, match=r"64:2:8 weight 64 x 64, 4672 bytes, found torch.uint8 \(9,\)"):
        form_of(torch.zeros(9, dtype=torch.uint8), Pattern.parse("64:2:8"), 64, 64)
