"""The compiled parts of SparseGPT's sweep (`sweep.cpp`): all groups of a block of columns, and turning matrices.

`sweep.py` computes the same by torch, group by group, where there is no library (no C++ compiler when sparsec was
installed), where SPARSEC_ISA=reference turns compiled code off, and for groups that are ranked instead of tried.
SPARSEC_ISA=portable | avx2 | avx512 names the best instructions that may be used.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sparsec.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("sparsec")

MOST_KEPT = 4  # of a group; what the library was compiled for
_VECTOR, _HEIGHT = 16, 64  # rows of the longest vector; rows taken at a time where none share columns
_LEVELS = ("portable", "avx2", "avx512")
_FOLDER = Path(__file__).parent
_I64, _PTR = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "sparsec_sweep": [_PTR],
    "sparsec_turn": [_PTR, _I64, _I64, _PTR, _PTR, _I64],
    "sparsec_keep": [_PTR, _I64, _I64, _PTR, _PTR, _PTR, _I64],
    "sparsec_gram": [_PTR],
    "sparsec_gram_supported": [],
}


class _Block(ctypes.Structure):
    """A mirror of `Block` in sweep.cpp, which says what each is."""

    _fields_ = [
        *((name, _I64) for name in ("rows", "width", "m", "n", "height", "taken", "sets", "quads")),
        *(
            (name, _PTR)
            for name in ("set", "pairs", "lost", "fed", "unit", "undo", "hessian", "values", "inverse", "scratch")
        ),
        *((name, _I64) for name in ("scratch_floats", "threads", "level")),
    ]


@cache
def _load() -> ctypes.CDLL | None:
    import torch  # noqa: F401  (first: it brings the OpenMP runtime that the library must share)

    files = sorted(_FOLDER.glob("_sweep*.so"))
    if not files:
        log.warning(
            "SparseGPT runs without compiled code, which takes longer: install a C++ compiler, reinstall sparsec"
        )
        return None
    try:
        library = ctypes.CDLL(str(files[0]))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = _I64 if name.endswith("supported") else None, arguments
    except (OSError, AttributeError) as error:
        log.warning("SparseGPT runs without compiled code, which takes longer: %s; reinstall sparsec", error)
        return None
    return library


def available(*tensors: Tensor) -> bool:
    """Whether there is a library (its absence is logged once), nobody turned it off, and it can read the tensors: it
    knows ordinary memory only. Raises UsageError."""
    forced = os.environ.get("SPARSEC_ISA", "")
    if forced not in ("", "reference", *_LEVELS):
        raise UsageError(f"SPARSEC_ISA={forced} is not known; expected one of {', '.join(_LEVELS)}, reference")
    return forced != "reference" and all(one.device.type == "cpu" for one in tensors) and _load() is not None


@dataclass(frozen=True)
class Groups:
    """What is tried in each whole group of a block, and what depends on the Hessian only."""

    m: int
    sets: Tensor
    """(sets, n) int32: columns of a group."""
    quads: Tensor | None
    """(quads, 6) int32: the pairs, as numbers of sets, inside each choice of 4 columns; None where rows share none."""
    sharing: int
    """Rows that share 4 columns."""
    undo: Tensor
    """(groups, m, m) float32."""
    hessian: Tensor
    """A, (groups, m, m) float32."""
    values: Tensor
    """What gives the kept values of a set from y, (groups, sets, n, m) float32."""
    inverse: Tensor | None
    """(A_SS)^-1, (groups, sets, n, n) float32; None where rows share no columns."""


def sweep_block(groups: Groups, lost: Tensor, fed: Tensor, unit: Tensor) -> None:
    """Prune whole groups: `lost` (width, rows) are their weights, and becomes what these lose.

    `fed`: what errors of earlier blocks add, (width, rows); `unit`: how errors inside the block act, (width, width).
    """
    import torch

    width, rows = lost.shape
    taken = _HEIGHT if groups.quads is None else min(groups.sharing, rows)
    height = -(-taken // _VECTOR) * _VECTOR
    floats = height * (width + 3 * groups.m + (0 if groups.quads is None else len(groups.sets)))
    threads = torch.get_num_threads()
    scratch = torch.empty(threads * floats + _VECTOR)
    held = {"set": groups.sets, "pairs": groups.quads, "lost": lost, "fed": fed, "unit": unit, "undo": groups.undo}
    held |= {"hessian": groups.hessian, "values": groups.values, "inverse": groups.inverse}
    sizes = {"rows": rows, "width": width, "m": groups.m, "n": groups.sets.shape[1], "height": height, "taken": taken}
    sizes |= {"sets": len(groups.sets), "quads": 0 if groups.quads is None else len(groups.quads)}
    sizes |= {"level": _LEVELS.index(os.environ.get("SPARSEC_ISA") or _LEVELS[-1])}
    sizes |= {"scratch_floats": floats, "threads": threads, "scratch": scratch.data_ptr() + -scratch.data_ptr() % 64}
    block = _Block(**sizes, **{name: _at(one) for name, one in held.items()})
    library().sparsec_sweep(ctypes.byref(block))


def turned(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Columns of float32 matrices, one below the other, in an order: (cols, rows)."""
    import torch

    found = torch.empty(len(order), sum(map(len, parts)))
    rows, place = _rows(parts), order.argsort()
    library().sparsec_turn(_at(rows), found.shape[1], found.shape[0], _at(place), _at(found), torch.get_num_threads())
    return found


def kept(parts: Sequence[Tensor], order: Tensor, lost: Tensor) -> Tensor:
    """Matrices less what they lost, (rows, cols); `lost` lies as `turned` gave it."""
    import torch

    found = torch.empty(lost.shape[1], lost.shape[0])
    rows, place = _rows(parts), order.argsort()
    library().sparsec_keep(_at(rows), *found.shape, _at(place), _at(lost), _at(found), torch.get_num_threads())
    return found


def library() -> ctypes.CDLL:
    """The library; only where it is `available`."""
    found = _load()
    assert found is not None
    return found


def _rows(parts: Sequence[Tensor]) -> Tensor:
    """Where each row begins."""
    import torch

    assert all(_at(part) and part.dtype == torch.float32 for part in parts)
    return torch.cat([part.data_ptr() + part.stride(0) * 4 * torch.arange(len(part)) for part in parts])


def _at(tensor: Tensor | None) -> int | None:
    """Its memory; native code takes nothing but runs of it."""
    assert tensor is None or (tensor.is_contiguous() and tensor.device.type == "cpu")
    return None if tensor is None else tensor.data_ptr()
