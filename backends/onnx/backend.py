"""The ONNX backend: writes model.onnx with exact zeros in place, and proves it with onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparsec import errors, ort
from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.layout import table_bytes
from sparsec.pattern import NM, VNM
from sparsec.uses import lowers_to_linear

if TYPE_CHECKING:
    from sparsec.backends.onnx.session import OnnxModule
    from sparsec.cost import TokenRange
    from sparsec.layout import Values
    from sparsec.program import Program
    from sparsec.sites import Site

Weights = Literal["dense", "packed"]

MODEL = "model.onnx"
DATA = "model.onnx.data"  # the weights, where they are too large for one protobuf file
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_DENSE = (
    "onnxruntime has no kernel for sparse weights, so it multiplies the zeros too; "
    "the weights hold exact zeros in place, which packed weights would not store"
)
_PACKED = "in a session of sparsec.ort; other runtimes unpack the weights while they load the file, and run dense"


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """One model.onnx, fp32, dynamic sizes as the program has them, for any runtime.

    1. The export runs in a process of its own: its hundreds of megabytes are given back when it ends.
    2. Nothing is left behind when it fails, and the error is one paragraph.
    3. `weights`: dense, with exact zeros in place; or packed, small on disk, run by sparsec's kernels in onnxruntime
       and unpacked by every other runtime (see `packed`).
    """

    name: ClassVar[str] = "onnx"
    describes: ClassVar[str] = "model.onnx for onnxruntime and other runtimes: exact zeros in dense weights, fp32"

    weights: Weights = "dense"

    def unavailable(self) -> str | None:
        """None, or the packages that are missing and how to install them."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} missing; pip install {' '.join(missing)}" if missing else None

    def refuses(self, program: Program) -> str | None:
        """Weights of another type than float32."""
        return _foreign_type(program)

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """What onnxruntime runs for every site."""
        return tuple(self._verdict(program, site) for site in program.sites.sparse)

    def _verdict(self, program: Program, site: Site) -> Verdict:
        if self.weights == "dense":
            return Verdict(site.name, False, "dense", _DENSE)
        if not is_packed(program, site):
            what = f"only layers of N:M and V:N:M weights are packed; this one is {site.kind} of {site.pattern}"
            return Verdict(site.name, False, "dense", what)
        if reason := ort.unavailable_reason():
            return Verdict(site.name, False, "dense", reason)
        return Verdict(site.name, True, "sparsec::NMLinear", _PACKED)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write model.onnx (and model.onnx.data where it is needed) of a frozen program."""
        _check_exportable(program)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:  # rule 2
            saved, written = program.save(Path(scratch) / "program"), Path(scratch) / "written"
            written.mkdir()
            facts = _run_exporter(saved, written / MODEL, self.weights)
            files = [path.rename(folder / path.name) for path in sorted(written.iterdir())]
        sparse = sum(self._nbytes(program, site) for site in program.sites.sparse)
        return Emitted(sparse, sum(path.stat().st_size for path in files), facts)

    def _nbytes(self, program: Program, site: Site) -> int:
        """Bytes that the site's weight takes in the file."""
        if self.weights == "packed" and is_packed(program, site):
            return table_bytes(site.pattern, site.shape)  # type: ignore[arg-type]
        return 4 * site.shape[0] * site.shape[1] * site.shape[2]

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read model.onnx: well formed, patterns bit for bit, equal to the packed tables, equal outputs."""
        from sparsec.backends.onnx.checks import verify

        return verify(folder, manifest, check)

    def load(self, folder: Path, manifest: dict[str, Any]) -> OnnxModule:
        """A callable that runs model.onnx in onnxruntime: inputs by position or name -> outputs by name."""
        from sparsec.backends.onnx.session import OnnxModule

        packed = manifest["backends"][self.name].get("weights") == "packed"
        return OnnxModule(folder / MODEL, "sparsec" if packed else "plain")


def is_packed(program: Program, site: Site) -> bool:
    """Whether packed weights include this site; the others stay dense."""
    return isinstance(site.pattern, (NM, VNM)) and lowers_to_linear(program.module, site)


def _check_exportable(program: Program) -> None:
    if "frozen" not in program.facts or program.facts & {"masked", "lowered"}:
        found = ", ".join(sorted(program.facts))
        raise errors.UsageError(
            f"the onnx backend takes a frozen program that is not lowered, found {found}; end the passes with freeze"
        )
    if reason := _foreign_type(program):
        raise errors.UsageError(reason)


def _foreign_type(program: Program) -> str | None:
    for name, tensor in program.module.named_parameters():
        if tensor.is_floating_point() and str(tensor.dtype) != "torch.float32":
            return (
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, and the onnx backend writes float32 only; "
                "compile with --dtype fp32, or leave onnx out of --backend"
            )
    return None


def _run_exporter(program: Path, out: Path, weights: Weights) -> dict[str, Any]:
    """Run the exporter on a saved program; its figures. Raises what the exporter reports (rule 1)."""
    module = "sparsec.backends.onnx.exporter"
    # -P: a file named onnx.py in the current folder must not be taken for the package.
    command = [sys.executable, "-P", "-m", module, str(program.absolute()), str(out.absolute()), weights]
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
