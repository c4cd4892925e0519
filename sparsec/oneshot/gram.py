"""Products x^T x0 of calibration data by tile units (AMX), in half the time that float32 takes, or less (`gram.cpp`).

Values are split into two bfloat16, high and low; the product of low parts is left out; sums are float32.
An element is right to 3e-5 of sqrt(G_ii G_jj), mostly to 4e-6. What is not finite stays so.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

from sparsec.oneshot import native

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS, _BLOCK = 256, 32  # as gram.cpp has them
_I64, _PTR = ctypes.c_int64, ctypes.c_void_p


class _Product(ctypes.Structure):
    """A mirror of `Product` in gram.cpp, which says what each is."""

    _fields_ = [
        *((name, _PTR) for name in ("x", "x0", "sums", "scratch")),
        *((name, _I64) for name in ("tokens", "cols", "strip", "fresh", "threads")),
    ]


def available(*tensors: Tensor) -> bool:
    """Whether processor, system and library can, as `native.available`; never where SPARSEC_ISA names less."""
    if os.environ.get("SPARSEC_ISA") or not native.available(*tensors):
        return False
    return bool(native.library().sparsec_gram_supported())


def add(x: Tensor, x0: Tensor, sums: Tensor, strip: int, fresh: bool) -> None:
    """Add x^T x0 (cols, cols) to `sums`: strips of so many rows, one after the other, each from its diagonal on.

    `x`, `x0`: (tokens, cols) float32; `strip`: a multiple of 64, or cols; `fresh`: `sums` holds nothing yet.
    """
    import torch

    x, x0 = x.contiguous(), x0.contiguous()
    tokens, cols = x.shape
    assert x.shape == x0.shape and x.dtype == x0.dtype == sums.dtype == torch.float32 and sums.is_contiguous()
    assert strip == cols or strip % 64 == 0
    if not tokens:
        if fresh:
            sums.zero_()
        return
    scratch = torch.empty(2 * _TOKENS * -(-cols // _BLOCK) * _BLOCK + 16, dtype=torch.int32)
    at = scratch.data_ptr() + -scratch.data_ptr() % 64
    sizes = (tokens, cols, strip, int(fresh), torch.get_num_threads())
    product = _Product(x.data_ptr(), x0.data_ptr(), sums.data_ptr(), at, *sizes)
    native.library().sparsec_gram(ctypes.byref(product))
