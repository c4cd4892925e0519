"""Weights that lie in a mapped file: read when they are used, and given back when they are not.

transformers maps safetensors files privately (`dtype` as stored), so a loaded model takes no memory until it runs, and
nothing that is done to it reaches the file. What has been read stays resident, though, until the system wants it back:
`release` says that it may go.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_PRESENT, _OF_A_FILE = 1 << 63, 1 << 61  # of an entry of /proc/self/pagemap: see proc_pid_pagemap(5)
_ENTRY = 8


def release(*tensors: Tensor) -> int:
    """Let go of the resident pages of tensors that are mapped from files; returns the bytes let go.

    Values stay as they are: a page is given back only where the system says that it still is the file's, so ordinary
    memory and pages that were written to are left alone. The next read takes the page from the file (or the system's
    cache of it) again. Does nothing where there is no /proc/self/pagemap. Not while another thread writes to a tensor.
    """
    released = 0
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
            continue
        start = tensor.data_ptr() // mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes - 1) // mmap.PAGESIZE + 1
        for first, last in _runs(_flags(start, end)):
            released += _give_back(start + first, last - first)
    return released


def _flags(start: int, end: int) -> Iterable[bool]:
    """For each page from `start` to `end`: whether it is resident and a file's."""
    import torch

    if not sys.platform.startswith("linux"):
        return []
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(start * _ENTRY)
            data = bytearray(file.read((end - start) * _ENTRY))
    except OSError:  # a sandbox may hide it
        return []
    entries = torch.frombuffer(data, dtype=torch.int64)
    wanted = _OF_A_FILE | (_PRESENT - (1 << 64))  # as a signed number
    flags: list[bool] = ((entries & wanted) == wanted).tolist()
    return flags


def _runs(flags: Iterable[bool]) -> Iterator[tuple[int, int]]:
    """First and last + 1 of each run of true flags."""
    first, i = None, -1
    for i, flag in enumerate(flags):
        if flag and first is None:
            first = i
        elif not flag and first is not None:
            yield first, i
            first = None
    if first is not None:
        yield first, i + 1


def _give_back(page: int, count: int) -> int:
    """Bytes given back; none where the system refuses, as it does for locked pages."""
    libc = ctypes.CDLL(None, use_errno=True)
    address, nbytes = ctypes.c_void_p(page * mmap.PAGESIZE), count * mmap.PAGESIZE
    return nbytes if libc.madvise(address, ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED) == 0 else 0


def trim() -> None:
    """Ask the C library to give freed memory back to the system: after many large and short-lived tensors it may keep
    several times what is in use. Does nothing where it has no such call."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(ctypes.c_size_t(0))
