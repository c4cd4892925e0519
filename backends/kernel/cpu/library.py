"""Find and load the native library, and choose the instruction set. Loaded after torch, so both share one OpenMP pool.

SPARSEC_ISA=avx512 | avx2 | portable | reference forces a level; `reference` leaves the library alone.
SPARSEC_LIBRARY=/path/to/other.so loads a library built another way, for tests; who sets it runs its code.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch  # noqa: F401  (first: it brings the OpenMP runtime the library must share)

from sparsec.errors import UsageError

Level = Literal["portable", "avx2", "avx512"]
LEVELS: tuple[Level, ...] = get_args(Level)  # a level's place is its number in the C interface

_I64, _INT, _PTR = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p
_SIGNATURES = {
    "sparsec_supports": (_INT, [_INT]),
    "sparsec_stream_nbytes": (_I64, [_PTR]),
    "sparsec_pack": (_INT, [_PTR, _I64] + [_PTR] * 5),
    "sparsec_check": (_INT, [_PTR, _I64]),
    "sparsec_describe": (_INT, [_PTR, _I64, _PTR]),
    "sparsec_unpack": (_INT, [_PTR, _I64] + [_PTR] * 4),
    "sparsec_linear": (_INT, [_PTR, _I64] + [_PTR] * 3 + [_I64] * 3 + [_INT] * 4),
}


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    named = os.environ.get("SPARSEC_LIBRARY")
    files = [Path(named)] if named else sorted(Path(__file__).parent.glob("_kernels*.so"))
    if not files:
        return None, "the CPU kernels were not built: install a C++ compiler and reinstall sparsec"
    if named and not files[0].is_file():
        raise UsageError(
            f"SPARSEC_LIBRARY={named} is not a file; unset it to use the library sparsec was installed with"
        )
    try:
        library = ctypes.CDLL(str(files[0]))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"the CPU kernels cannot be loaded ({error}): reinstall sparsec"
    return library, ""


@cache
def supported() -> tuple[Level, ...]:
    """The levels this processor and this library can run, lowest first."""
    library, _ = _load()
    if library is None:
        return ()
    return tuple(name for number, name in enumerate(LEVELS) if library.sparsec_supports(number))


@cache
def _choose(forced: str) -> tuple[Level | None, str]:
    if forced and forced != "reference" and forced not in LEVELS:
        raise UsageError(f"SPARSEC_ISA={forced} is not known; expected one of {', '.join(LEVELS)}, reference")
    if forced == "reference":
        return None, "SPARSEC_ISA=reference turns the CPU kernels off"
    library, reason = _load()
    if library is None:
        return None, reason
    if forced and forced not in supported():
        raise UsageError(f"SPARSEC_ISA={forced}, but this processor runs only {', '.join(supported())}")
    return forced or supported()[-1], ""


@cache
def level() -> Level | None:
    """The level that runs: the best of this processor, or the one SPARSEC_ISA named at the first call; or None."""
    return _choose(os.environ.get("SPARSEC_ISA", ""))[0]


@cache
def unavailable_reason() -> str | None:
    """Why there are no CPU kernels here, or None when there are."""
    return _choose(os.environ.get("SPARSEC_ISA", ""))[1] or None


def library() -> ctypes.CDLL:
    """The loaded library; RuntimeError with the reason when it is missing."""
    loaded, reason = _load()
    if loaded is None:
        raise RuntimeError(reason)
    return loaded
