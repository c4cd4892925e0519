"""Build an engine in a process of its own: `python -m ... SETTINGS ONNX ENGINE LOG`, settings as JSON.

TensorRT ends the process where it meets a fault of its own, and keeps gigabytes until the process ends.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from sparsec import child
from sparsec.backends.tensorrt.driver import Settings, build
from sparsec.errors import SparsecError

_ADVICE = "leave tensorrt out of --backend, or write the ONNX file only with 'tensorrt{driver=none}'"


def run(settings: Settings, onnx: Path, engine: Path, log: Path) -> dict[str, Any]:
    """`build` in a child process; its facts and seconds. Raises what it raises, or ArtifactError where it died."""
    # Names relative to the file's folder: the log must not say where it was built.
    files = [onnx.name, str(engine.absolute()), str(log.absolute())]
    arguments = [json.dumps(vars(settings)), *files]
    return child.run("sparsec.backends.tensorrt.building", arguments, "the TensorRT build", _ADVICE, onnx.parent)


def main() -> int:
    """Build what the command line says; print one JSON line."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        settings = Settings(**json.loads(sys.argv[1]))
        try:
            report = build(settings, *map(Path, sys.argv[2:]))
        except SparsecError as error:
            report = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps({**report, "seconds": round(time.perf_counter() - start, 2)}))
    return int("error" in report)


if __name__ == "__main__":
    sys.exit(main())
