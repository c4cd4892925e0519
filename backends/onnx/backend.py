"""The ONNX backend: writes model.onnx with exact zeros in place, and proves it with onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparsec import errors
from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict

if TYPE_CHECKING:
    from sparsec.backends.onnx.session import OnnxModule
    from sparsec.layout import Values
    from sparsec.program import Program

MODEL = "model.onnx"
DATA = "model.onnx.data"  # the weights, where they are too large for one protobuf file
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_REASON = (
    "onnxruntime has no kernel for sparse weights, so it multiplies the zeros too; "
    "the weights hold exact zeros in place, their packed form is not there yet"
)


class OnnxBackend(Backend):
    """Dense weights with exact zeros, fp32, dynamic sizes as the program has them. Slower than `kernel`, but portable.

    1. The export runs in a process of its own: its hundreds of megabytes are given back when it ends.
    2. Nothing is left behind when it fails, and the error is one paragraph.
    """

    name: ClassVar[str] = "onnx"
    describes: ClassVar[str] = "model.onnx for onnxruntime and other runtimes: exact zeros in dense weights, fp32"

    def unavailable(self) -> str | None:
        """None, or the packages that are missing and how to install them."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} missing; pip install {' '.join(missing)}" if missing else None

    def plan(self, program: Program, values: Values = "fp32") -> tuple[Verdict, ...]:
        """Every site runs dense here, and says so."""
        return tuple(Verdict(site.name, False, "dense", _REASON) for site in program.sites.sparse)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write model.onnx (and model.onnx.data where it is needed) of a frozen program."""
        _check_exportable(program)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:  # rule 2
            saved, written = program.save(Path(scratch) / "program"), Path(scratch) / "written"
            written.mkdir()
            facts = _run_exporter(saved, written / MODEL)
            files = [path.rename(folder / path.name) for path in sorted(written.iterdir())]
        sparse = sum(4 * site.shape[0] * site.shape[1] * site.shape[2] for site in program.sites.sparse)
        return Emitted(sparse, sum(path.stat().st_size for path in files), facts)

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read model.onnx: well formed, patterns bit for bit, equal to the packed tables, equal outputs."""
        from sparsec.backends.onnx.checks import verify

        return verify(folder, manifest, check)

    def load(self, folder: Path, manifest: dict[str, Any]) -> OnnxModule:
        """A callable that runs model.onnx in onnxruntime: inputs by position or name -> outputs by name."""
        from sparsec.backends.onnx.session import OnnxModule

        return OnnxModule(folder / MODEL)


def _check_exportable(program: Program) -> None:
    if "frozen" not in program.facts or program.facts & {"masked", "lowered"}:
        found = ", ".join(sorted(program.facts))
        raise errors.UsageError(
            f"the onnx backend takes a frozen program that is not lowered, found {found}; end the passes with freeze"
        )
    for name, tensor in program.module.named_parameters():
        if tensor.is_floating_point() and str(tensor.dtype) != "torch.float32":
            raise errors.UsageError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and the onnx backend writes float32 only; "
                "compile with --dtype fp32, or leave onnx out of --backend"
            )


def _run_exporter(program: Path, out: Path) -> dict[str, Any]:
    """Run the exporter on a saved program; its figures. Raises what the exporter reports (rule 1)."""
    module = "sparsec.backends.onnx.exporter"
    # -P: a file named onnx.py in the current folder must not be taken for the package.
    command = [sys.executable, "-P", "-m", module, str(program.absolute()), str(out.absolute())]
    process = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=False)
    try:
        report = json.loads(process.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise errors.ArtifactError(_death(process)) from None
    if message := report.get("error"):
        kind = getattr(errors, report["kind"], errors.ArtifactError)
        raise kind(message)
    facts: dict[str, Any] = report
    return facts


def _environment() -> dict[str, str]:
    """The child finds the packages that this process found, and computes on as many threads."""
    import torch

    paths = [os.path.abspath(path) for path in sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _death(process: subprocess.CompletedProcess[str]) -> str:
    """One paragraph about a child that ended without a report."""
    if process.returncode < 0:
        return (
            f"the ONNX export was ended by signal {-process.returncode}, most likely for want of memory; "
            "close other programs, or leave onnx out of --backend"
        )
    lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    return f"the ONNX export ended with status {process.returncode}: {last}"
