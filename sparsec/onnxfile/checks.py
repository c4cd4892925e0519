"""Proofs about an imported model.onnx on disk: well formed, patterns in its weights, the stored outputs again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import registry
from sparsec.backend import FP32_TOLERANCE, Check, CheckData, compare
from sparsec.errors import SparsecError
from sparsec.onnxfile.opened import OnnxFile, first_line
from sparsec.onnxfile.weights import Weight, survey
from sparsec.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor


def checker_fault(path: Path) -> str | None:
    """What onnx's full checker says against a file, in one line, or None."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:  # checker and shape inference share no base class
        return first_line(error)
    return None


def verify(path: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """One check for each fact; that about all weights names the first that breaks its pattern."""
    fault, known = checker_fault(path), manifest["backends"]["onnx"].get("invalid")
    if fault and not known:
        return [Check("onnx: well formed", False, fault)]
    said = f"fails the full ONNX checker ({fault}), as the original did" if fault else "passes the full ONNX checker"
    checks = [Check("onnx: well formed", True, f"{path.name} {said}")]
    try:
        file = OnnxFile(path)
        weights = {weight.name: weight for weight in survey(file).weights}
    except SparsecError as error:
        return [*checks, Check("onnx: weights", False, str(error))]
    sparse = [(site["name"], Pattern.parse(site["pattern"])) for site in manifest["sites"] if site["pattern"]]
    faults = [f"{name}: {fault}" for name, pattern in sparse if (fault := _fault(file, weights.get(name), pattern))]
    said = f"{len(sparse)} weights, as their nodes multiply them, satisfy their pattern bit for bit"
    checks.append(Check("onnx: patterns", not faults, faults[0] if faults else said))
    return [*checks, _outputs(path, manifest, check)]


def _fault(file: OnnxFile, weight: Weight | None, pattern: Pattern) -> str | None:
    if weight is None:
        return "no Gemm, MatMul or Conv multiplies a weight of this name"
    try:
        values: Tensor = weight.read(file)
    except SparsecError as error:
        return str(error)
    broken = pattern.violations(values)
    return f"breaks {pattern}, first at {broken.first[0]} ({broken.count} in all)" if broken.count else None


def _outputs(path: Path, manifest: dict[str, Any], check: CheckData) -> Check:
    if reason := manifest["backends"]["onnx"].get("not_run"):
        return Check("onnx: structure only", True, f"outputs were not compared, at compile neither: {reason}")
    name = "onnx: outputs in onnxruntime"
    try:
        found = registry.backend("onnx").load(path.parent, manifest)(**check.inputs)
    except SparsecError as error:
        return Check(name, False, str(error))
    return compare(name, found, check.outputs, manifest.get("tolerance", FP32_TOLERANCE))
