"""Run a packed model.onnx in onnxruntime with sparsec's kernels. Needs onnxruntime, neither torch nor the artifact.

    import sparsec.ort

    session = sparsec.ort.session("model.onnx")  # an onnxruntime.InferenceSession

The same file runs without the library too, at dense speed: onnxruntime then unpacks the weights while it loads.
Programs in other languages register `library()` themselves, with RegisterCustomOpsLibrary; the session entry
`sparsec.threads` tells it the size of the session's pool (without it, work is cut for one thread a processor).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from sparsec.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

log = logging.getLogger("sparsec")
_MISSING = "the library for onnxruntime was not built: install a C++ compiler and reinstall sparsec"
THREADS = "sparsec.threads"  # the session entry that tells the operator its pool size
_REGISTERED = "sparsec.registered"  # marks options that the library is registered in


def library() -> Path:
    """The library of operators for onnxruntime on the CPU. Raises UsageError where it was not built."""
    if not (found := _found()):
        raise UsageError(_MISSING)
    return found[0]


def unavailable_reason() -> str | None:
    """Why packed weights run at dense speed here, or None."""
    if os.environ.get("SPARSEC_ISA") == "reference":
        return "SPARSEC_ISA=reference turns the CPU kernels off"
    return None if _found() else _MISSING


def session(model: str | os.PathLike[str] | bytes, options: SessionOptions | None = None) -> InferenceSession:
    """A session on the CPU in which packed weights run sparse kernels, on the session's own threads.

    `model`: a file, or its content. `options`: onnxruntime's, with its thread count; the library is registered in them.
    Where the library is missing, or SPARSEC_ISA=reference switches the kernels off, a warning says so and the weights
    run densely. Raises ArtifactError when onnxruntime refuses the file.
    """
    import onnxruntime

    options = options or onnxruntime.SessionOptions()
    if reason := unavailable_reason():
        log.warning("packed ONNX weights run at dense speed: %s", reason)
    else:
        _register(options)
    name, given = ("the model", model) if isinstance(model, bytes) else (os.fspath(model), os.fspath(model))
    try:
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ArtifactError(f"{name}: onnxruntime cannot load it: {error}") from error


def _found() -> list[Path]:
    return sorted(Path(__file__).parent.glob("_ort*.so"))


def _register(options: SessionOptions) -> None:
    if _entry(options, _REGISTERED):
        return
    # 0 is onnxruntime's own choice: a thread for each core it may use.
    threads = options.intra_op_num_threads or len(os.sched_getaffinity(0))
    if not _entry(options, THREADS):
        options.add_session_config_entry(THREADS, str(threads))
    options.add_session_config_entry(_REGISTERED, "1")
    options.register_custom_ops_library(str(library()))


def _entry(options: SessionOptions, key: str) -> str:
    try:
        return str(options.get_session_config_entry(key))
    except RuntimeError:  # no such entry
        return ""
