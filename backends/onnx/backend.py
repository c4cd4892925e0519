"""The ONNX backend: writes one model.onnx, packed or with exact zeros in place, and proves it with onnxruntime."""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from sparsec import _fx, child, errors, ort
from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.backends.onnx.packed import no_product, why_dense
from sparsec.layout import VALUE_BYTES, Values, table_bytes
from sparsec.onnxfile import checks as onnxfile_checks
from sparsec.uses import lowers_to_linear

if TYPE_CHECKING:
    from sparsec.backends.onnx.session import OnnxModule
    from sparsec.cost import TokenRange
    from sparsec.program import Program
    from sparsec.sites import Site

Weights = Literal["packed", "dense"]
Form = Literal["gemm", "matmul"]

MODEL = "model.onnx"
DATA = "model.onnx.data"  # the weights, where they are too large for one protobuf file
TYPES = ("float32", "float16", "bfloat16")  # of weights; float64 and others have no use in a deployed file
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_DENSE = (
    "onnxruntime has no kernel for sparse weights, so it multiplies the zeros too; "
    "the weights hold exact zeros in place, which packed weights would not store"
)
_PACKED = "in a session of sparsec.ort; other runtimes unpack the weights while they load the file, and run dense"
_ADVICE = "close other programs, or leave onnx out of --backend"
_UNPACKED = "stored packed, and unpacked by the runtime while it loads the file"


@dataclass(frozen=True)
class OnnxBackend(Backend):
    """One model.onnx, in the types and with the dynamic sizes that the program has, for any runtime.

    1. The export runs in a process of its own: its hundreds of megabytes are given back when it ends.
    2. Nothing is left behind when it fails, and the error is one paragraph.
    3. `weights`: packed, small on disk, run by sparsec's kernels in onnxruntime and unpacked by every other runtime
       (see `packed`); or dense, with exact zeros in place, for tools that look for them (TensorRT, polygraphy).
    4. `form`: what a linear layer on a dense weight becomes. gemm: Reshape, Gemm(transB=1), Reshape; matmul: MatMul on
       a Transpose of the weight, and Add. Both keep the weight's name and (rows, cols) layout. Which of the two a
       TensorRT version takes for sparse differs, so it is a choice to measure, and nothing rewrites one to the other.
    """

    name: ClassVar[str] = "onnx"
    describes: ClassVar[str] = "model.onnx for onnxruntime and any other runtime: packed weights, or dense with zeros"
    stores: ClassVar[tuple[Values, ...]] = ("fp32", "bf16")

    weights: Weights = "packed"
    form: Form = "gemm"

    def __post_init__(self) -> None:
        if self.form == "matmul" and self.weights == "packed":
            raise ValueError("form=matmul is for dense weights, which weights=packed has not; add weights=dense")

    def unavailable(self) -> str | None:
        """None, or the packages that are missing and how to install them."""
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        return f"{' and '.join(missing)} missing; pip install {' '.join(missing)}" if missing else None

    def refuses(self, program: Program) -> str | None:
        """Weights of a type that it does not write."""
        return _foreign_type(program)

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        """What onnxruntime runs for every site."""
        return tuple(self._verdict(program, site) for site in program.sites.sparse)

    def _verdict(self, program: Program, site: Site) -> Verdict:
        if self.weights == "dense":
            return Verdict(site.name, False, "dense", _DENSE)
        if reason := unpackable(site):
            return Verdict(site.name, False, "dense", reason)
        if reason := why_not_linear(program, site):
            return Verdict(site.name, False, "dense", f"{_UNPACKED}: {reason}")
        if reason := ort.unavailable_reason():
            return Verdict(site.name, False, "dense", reason)
        return Verdict(site.name, True, "sparsec::NMLinear", _PACKED)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        """Write model.onnx (and model.onnx.data where it is needed) of a frozen program."""
        _check_exportable(program)
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch:  # rule 2
            saved, written = program.save(Path(scratch) / "program"), Path(scratch) / "written"
            written.mkdir()
            arguments = [str(saved.absolute()), str((written / MODEL).absolute()), self.weights, self.form, values]
            facts = child.run("sparsec.backends.onnx.exporter", arguments, "the ONNX export", _ADVICE)
            files = [path.rename(folder / path.name) for path in sorted(written.iterdir())]
        sparse = sum(self._nbytes(program, site, values) for site in program.sites.sparse)
        return Emitted(sparse, sum(path.stat().st_size for path in files), facts)

    def _nbytes(self, program: Program, site: Site, values: Values) -> int:
        """Bytes that the site's weight takes in the file."""
        own: int = _fx.get_tensor(program.module, site.name).dtype.itemsize
        if self.weights == "packed" and not unpackable(site):
            value_bytes = own if values == "fp32" else VALUE_BYTES[values]  # fp32: not rounded further
            moved = site.selection is not None and site.selection.rows is not None
            return table_bytes(site.pattern, site.shape, value_bytes, moved)  # type: ignore[arg-type]
        return own * site.shape[0] * site.shape[1] * site.shape[2]

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        """Re-read model.onnx: well formed, patterns bit for bit, equal to the packed tables, equal outputs."""
        if manifest["backends"][self.name].get("imported"):
            return onnxfile_checks.verify(folder / MODEL, manifest, check)
        from sparsec.backends.onnx.checks import verify

        return verify(folder, manifest, check)

    def load(self, folder: Path, manifest: dict[str, Any]) -> OnnxModule:
        """A callable that runs model.onnx in onnxruntime: inputs by position or name -> outputs by name."""
        from sparsec.backends.onnx.session import OnnxModule

        packed = manifest["backends"][self.name].get("weights") == "packed"
        return OnnxModule(folder / MODEL, "sparsec" if packed else "plain")

    def load_file(self, path: Path) -> OnnxModule:
        """The same for any .onnx file, in onnxruntime's own kernels."""
        from sparsec.backends.onnx.session import OnnxModule

        return OnnxModule(path)


def unpackable(site: Site) -> str | None:
    """Why a sparse site's weight stays dense in a packed file, or None."""
    assert site.pattern is not None
    return why_dense(site.pattern.executable, site.shape)


def why_not_linear(program: Program, site: Site) -> str | None:
    """Why a weight that is packed does not become NMLinear, or None."""
    assert site.pattern is not None
    dtype = _fx.get_tensor(program.module, site.name).dtype
    if reason := no_product(site.pattern.executable, site.selection is not None and site.selection.rows is not None):
        return reason
    if not lowers_to_linear(program.module, site):
        return f"the kernels run linear layers, this one is {site.kind}, read in parts or looked up"
    if str(dtype) != "torch.float32":
        return f"the kernels take float32 activations, the layer computes in {str(dtype).removeprefix('torch.')}"
    return None


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
        found = str(tensor.dtype).removeprefix("torch.")
        if (tensor.is_floating_point() or tensor.is_complex()) and found not in TYPES:
            return (
                f"{name} is {found}, and the onnx backend writes {', '.join(TYPES)}; cast the model before it is "
                "traced (--dtype for Hugging Face models), or leave onnx out of --backend"
            )
    return None
