"""Which calls on packed tables have a sparse kernel."""

from __future__ import annotations

import torch

from sparsec.lowered import PackedCall
from sparsec.pattern import NM, VNM, Pattern, Strip


def has_kernel(call: PackedCall) -> bool:
    """Whether a sparse kernel can run it on some machine."""
    fits = call.view is None and call.dtype == torch.float32
    return fits and no_kernel(call.layout.pattern, call.layout.stored) is None


def no_kernel(pattern: Pattern, stored: str) -> str | None:
    """Why values of a linear layer that are stored like this (see `SparseLayout.stored`) have no kernel, or None."""
    if not isinstance(pattern, (NM, VNM, Strip)):
        return f"{pattern} is stored small; no kernel makes it faster than dense"
    if isinstance(pattern, Strip) and pattern.v % Strip.ROWS:
        return (
            f"{pattern} is stored packed and multiplied dense: kernels take {Strip.ROWS} rows of a strip at once, so V "
            f"must be a multiple of {Strip.ROWS}"
        )
    if stored == "int8" and not isinstance(pattern, VNM):
        return (
            f"{pattern} is stored as int8 and multiplied in float32: int8 kernels need the 4 shared columns of V:N:M, "
            "in windows"
        )
    if stored not in ("fp32", "bf16", "int8"):
        return f"{stored} values of {pattern} are stored packed and multiplied in float32; they have no sparse kernel"
    return None
