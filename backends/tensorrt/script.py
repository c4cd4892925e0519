"""build.sh: how to build the same engine with trtexec, for machines that are set up differently."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from sparsec.backends.tensorrt.driver import Settings

ENGINE, LOG = "trtexec.engine", "trtexec.log"


def script(onnx: str, settings: Settings) -> str:
    """The text of build.sh; sizes, precision and limits are those of `settings`."""
    command = ["trtexec", f"--onnx={onnx}", f"--saveEngine={ENGINE}", "--sparsity=enable", *_shapes(settings.shapes)]
    command += ["--stronglyTyped"] if settings.precision == "model" else [f"--{settings.precision}"]
    command += [f"--memPoolSize=workspace:{settings.workspace_mb}"] if settings.workspace_mb else []
    command += [*(["--refit"] if settings.refit else []), *(["--stripWeights"] if settings.strip else [])]
    command += ["--profilingVerbosity=detailed", "--verbose"]
    line = " ".join(map(shlex.quote, command))
    return f"""#!/bin/sh
# Builds an engine that may use sparse kernels, on the GPU that it is for, and says which layers use them.
# TensorRT 11 types every network strongly: if its trtexec does not know --stronglyTyped, leave it out.
set -eu
cd "$(dirname "$0")"
{line} > {LOG} 2>&1 || {{ tail -n 20 {LOG}; exit 1; }}
grep '(Sparsity)' {LOG} || echo "the log says nothing about sparsity"

# Proof, with times, that `sparsec inspect` shows:  python -m sparsec.backends.tensorrt.prove THIS_ARTIFACT
# onnxruntime's TensorRT provider uses sparse kernels with:  export ORT_TENSORRT_SPARSITY_ENABLE=1
# An independent judge of the 2:4 pattern (25 s for 10 million weights):  polygraphy inspect sparsity {onnx}
"""


def _shapes(shapes: Mapping[str, tuple[list[int], list[int], list[int]]]) -> list[str]:
    if not shapes:
        return []
    options = []
    for i, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        inputs = (f"{name}:{'x'.join(map(str, three[i]))}" for name, three in shapes.items())
        options.append(f"--{option}={','.join(inputs)}")
    return options
