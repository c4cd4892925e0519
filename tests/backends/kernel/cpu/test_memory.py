"""No kernel touches a byte outside its tensors, shown by pages that fault."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from torch import Tensor

from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.layout import stored_as


def guarded(tensor: Tensor) -> tuple[Tensor, mmap.mmap]:
    """A copy that ends where a page without access begins."""
    page, nbytes = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    room = -(-nbytes // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - nbytes)
    return copy.view(tensor.shape).copy_(tensor), memory


@pytest.mark.parametrize("kernel", [1, 2])
@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", ["1:1", "2:3", "2:4", "3:7", "2:8", "5:11", "16:16", "2:40", "8:2:5", "16:2:40",
                                     "16:2:5@strip", "16:2:7@strip@moved"])  # fmt: skip
def test_no_byte_beyond_the_tensors_is_touched(make_layout, pattern: str, level: library.Level, kernel: int) -> None:
    m = int(pattern.split("@")[0].split(":")[-1])
    for case in range(12):
        rows, cols, tokens = 1 + case * 7 % 37, 1 + case * 11 % (3 * m), 1 + case * 5 % 17
        tensors = (
            pack(make_layout(pattern, rows, cols, case)),
            torch.randn(tokens, cols),
            torch.randn(rows),
            torch.full((tokens, rows), torch.nan),
        )
        kept = [guarded(tensor) for tensor in tensors]  # the maps must outlive the call
        stream, x, bias, y = (tensor for tensor, _ in kept)
        code = library.library().sparsec_linear(
            stream.data_ptr(), stream.numel(), x.data_ptr(), bias.data_ptr(), y.data_ptr(),
            tokens, rows, cols, 2, kernel, 1, library.LEVELS.index(level),
        )  # fmt: skip
        assert code == 0
        assert bool(y.isfinite().all())


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", ["1:2:4", "16:2:4", "20:2:5", "16:2:8", "8:2:13", "16:2:16", "16:2:40"])
def test_no_byte_beyond_the_tensors_is_touched_in_int8(make_layout, pattern: str, level: library.Level) -> None:
    m = int(pattern.split(":")[-1])
    for case in range(12):
        rows, cols, tokens = 1 + case * 7 % 37, 1 + case * 11 % (3 * m), 1 + case * 5 % 17
        workspace = torch.zeros(int8._functions().sparsec_int8_workspace(tokens, cols), dtype=torch.uint8)
        tensors = (
            int8.pack(stored_as(make_layout(pattern, rows, cols, case), "int8")),
            torch.randn(tokens, cols),
            torch.randn(rows),
            torch.zeros(tokens, rows),
            workspace[: len(workspace) // 4 * 4],
        )
        kept = [guarded(tensor) for tensor in tensors]  # the maps must outlive the call
        stream, x, bias, y, scratch = (tensor for tensor, _ in kept)
        code = library.library().sparsec_int8_linear(
            stream.data_ptr(), stream.numel(), x.data_ptr(), bias.data_ptr(), y.data_ptr(),
            tokens, rows, cols, 0, scratch.data_ptr(), 1, library.LEVELS.index(level),
        )  # fmt: skip
        assert code == 0
        assert bool(y.any())
