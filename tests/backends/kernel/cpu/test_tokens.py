"""The token kernel gives the bits of the row kernel: both add a row's products in the order of the stream."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import run
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.layout import decompress

PATTERNS = (
    "1:1", "1:4", "2:4", "4:4", "1:5", "2:8", "3:7", "5:9", "1:16", "16:16", "3:17", "2:32", "5:256",
    "1:2:4", "7:2:9", "64:2:5", "64:2:8", "33:2:40", "16:2:17", "48:2:40", "16:2:256",
    "16:2:5@strip", "64:2:8@strip@moved", "48:2:40@strip@moved",
)  # fmt: skip


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_residues_give_the_bits_of_the_row_kernel(make_layout, pattern: str, level: library.Level) -> None:
    m = int(pattern.split("@")[0].split(":")[-1])
    for case in range(24):
        rows, cols, tokens = case * 7 % 83 + 1, case % 4 * m + case * 5 % m + 1, case * 37 % 150 + 1
        stream, x = pack(make_layout(pattern, rows, cols, case)), torch.randn(tokens, cols)
        bias = torch.randn(rows) if case % 2 else None

        by_rows = run(x, stream, bias, rows, 1, level, "none", "rows")
        assert torch.equal(by_rows, run(x, stream, bias, rows, 1, level, "none", "tokens"))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_patterns_give_the_bits_of_the_row_kernel(make_layout, data: st.DataObject) -> None:
    shared = data.draw(st.booleans())
    m = data.draw(st.integers(4 if shared else 1, 256) | st.integers(4 if shared else 1, 33))
    v = data.draw(st.integers(1, 70) | st.sampled_from((16, 64)))
    pattern = f"{v}:2:{m}" if shared else f"{data.draw(st.integers(1, m))}:{m}"
    rows, cols, tokens = (data.draw(st.integers(1, top)) for top in (150, 700, 140))
    stream, x = pack(make_layout(pattern, rows, cols, 0)), torch.randn(tokens, cols)
    for level in library.supported():
        by_rows = run(x, stream, None, rows, 1, level, "none", "rows")
        assert torch.equal(by_rows, run(x, stream, None, rows, 1, level, "none", "tokens"))


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", ["2:4", "64:2:5", "48:2:40", "3:40", "64:2:5@strip", "64:2:5@strip@moved"])
def test_many_ranges_and_bands(make_layout, pattern: str, level: library.Level) -> None:
    # 5000 rows: their sums leave half of a second-level cache; 600 columns: more than one panel.
    rows, cols, tokens = 5000, 600, 70
    stream, x, bias = pack(make_layout(pattern, rows, cols, 0)), torch.randn(tokens, cols), torch.randn(rows)
    by_rows = run(x, stream, bias, rows, 1, level, "relu", "rows")

    for threads in (1, 2, 3):
        assert torch.equal(by_rows, run(x, stream, bias, rows, threads, level, "relu", "tokens"))


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("pattern", ["64:2:8", "16:2:8@strip@moved"])
def test_threads_share_tokens_or_rows(make_layout, level: library.Level, threads: int, pattern: str) -> None:
    stream, x = pack(make_layout(pattern, 200, 333, 0)), torch.randn(800, 333)
    for tokens in (800, 257, 9):
        one = run(x[:tokens], stream, None, 200, 1, level, "none", "tokens")
        assert torch.equal(one, run(x[:tokens], stream, None, 200, threads, level, "none", "tokens"))


ROUNDING = 2.0**-24  # of one fp32 operation


def repeated(nbytes: int, period: int) -> tuple[int, Tensor]:
    """An address range of `nbytes` that shows the same `period` bytes of memory again and again, and those bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.memfd_create("repeated")
    os.ftruncate(file, period)
    start = libc.mmap(None, nbytes, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    fixed = 0x10  # MAP_FIXED, which the module does not name
    for at in range(0, nbytes, period):
        size = min(period, nbytes - at)
        shown = libc.mmap(start + at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | fixed, file, 0)
        assert shown == start + at
    return start, torch.frombuffer(mmap.mmap(file, period), dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize(("rows", "cols"), [(65536, 4), (16, 65536)])
def test_more_than_two_to_the_31_elements(make_layout, rows: int, cols: int, kernel: int) -> None:
    # y or x has 2^31 + 65536 elements, but its memory is one part of 256 tokens, shown again and again: 64 MB. What the
    # last 256 tokens wrote is left there.
    tokens, part = 32769, 256
    layout = make_layout("1:4", rows, cols, 0)
    stream, weight = pack(layout), decompress(layout)[0].double()
    y_at, y = repeated(tokens * rows * 4, part * rows * 4)
    x_at, x = repeated(tokens * cols * 4, part * cols * 4)
    x.normal_(generator=torch.Generator().manual_seed(0))
    level = len(library.supported()) - 1
    code = library.library().sparsec_linear(
        stream.data_ptr(), stream.numel(), x_at, None, y_at, tokens, rows, cols, 0, kernel, 1, level,
    )  # fmt: skip

    assert code == 0
    taken = x.view(part, cols).double()
    bound = (cols // 4 + 2) * ROUNDING * (taken.abs() @ weight.abs().T)  # as in test_linear.py: proven, not measured
    assert bool(((y.view(part, rows) - taken @ weight.T).abs() <= bound).all())
