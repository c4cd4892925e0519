"""Proofs about a model.onnx on disk. Nothing the exporter said is believed: everything is read again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import ort, store
from sparsec.backend import FP32_TOLERANCE, Check, CheckData, compare
from sparsec.backends.onnx.backend import MODEL
from sparsec.backends.onnx.reading import PackedTables, Weights
from sparsec.backends.onnx.session import NO_KERNEL, OnnxModule, first_line
from sparsec.backends.onnx.widening import widen
from sparsec.errors import SparsecError
from sparsec.pattern import Pattern
from sparsec.vnm import violations_alone

if TYPE_CHECKING:
    from torch import Tensor


def verify(folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """One check for each fact; a fact about many sites names the first that breaks it."""
    path = folder / MODEL
    try:
        weights = Weights(path)
    except Exception as error:  # protobuf, onnx's checker and the file system share no base class
        return [Check("onnx: well formed", False, f"{first_line(error)}; copy the whole folder, or compile it again")]
    sites = [site for site in manifest["sites"] if site["pattern"]]
    checks = [
        Check("onnx: well formed", True, f"{path.name} passes the full ONNX checker"),
        _all("onnx: patterns", sites, lambda site: _pattern(site, weights.read(site)), _proven(sites)),
        _all("onnx: layers", sites, weights.misuse, "are what the graph multiplies with"),
    ]
    if (folder / store.GRAPH).is_file():
        packed = PackedTables(folder)
        words = "equal the kernel backend's packed tables bit for bit"
        checks.append(
            _all("onnx: packed tables", sites, lambda site: _difference(weights.read(site), packed.read(site)), words)
        )
    tolerance = manifest.get("tolerance", FP32_TOLERANCE)
    if weights.packed:
        fault = weights.foreign_function()
        checks.append(Check("onnx: operators", fault is None, fault or "are also functions in standard operators"))
    checks.append(_outputs("onnx: outputs in onnxruntime", path, "plain", check, tolerance))
    if weights.packed and ort.unavailable_reason() is None:
        checks.append(_outputs("onnx: outputs with sparsec's kernels", path, "sparsec", check, tolerance))
    return checks


def _difference(found: Tensor, packed: Tensor) -> str | None:
    """Where the ONNX weight differs from the packed one, or None. Both may be rounded, and stored in any float type."""
    import torch

    if packed.shape == found.shape and torch.equal(*(t.float().view(torch.int32) for t in (packed, found))):
        return None
    return "the ONNX weight and the packed weight differ"


def _pattern(site: dict[str, Any], found: Tensor) -> str | None:
    import torch

    violations = violations_alone(Pattern.parse(site["pattern"]), found, site.get("moved", False))
    if violations.count:
        return f"breaks {site['pattern']}, first at {violations.first[0]} ({violations.count} in all)"
    negative = ((found == 0) & torch.signbit(found)).nonzero()
    if len(negative):
        _, row, column = negative[0].tolist()
        return f"{len(negative)} zeros are -0.0, expected +0.0 only; first: row {row}, column {column}"
    return None


def _proven(sites: list[dict[str, Any]]) -> str:
    if all(Pattern.parse(site["pattern"]).decidable for site in sites):
        return "satisfy their pattern bit for bit"
    return (
        "break no count of their pattern; the columns of a strip's groups are known to the kernel backend's tables only"
    )


def _all(name: str, sites: list[dict[str, Any]], fault: Callable[[dict[str, Any]], str | None], words: str) -> Check:
    """One check over all sites: the first fault, by site, or that there is none."""
    faults = [(site["name"], text) for site in sites if (text := _text(fault, site)) is not None]
    if not faults:
        return Check(name, True, f"{len(sites)} weights {words}")
    more = f" (and {len(faults) - 1} more weights)" if len(faults) > 1 else ""
    return Check(name, False, f"{faults[0][0]}: {faults[0][1]}{more}")


def _text(fault: Callable[[dict[str, Any]], str | None], site: dict[str, Any]) -> str | None:
    try:
        return fault(site)
    except SparsecError as error:  # there is no weight to look at
        return str(error)


def _outputs(name: str, path: Path, kernels: Literal["plain", "sparsec"], check: CheckData, tolerance: float) -> Check:
    try:
        return compare(name, OnnxModule(path, kernels)(**check.inputs), check.outputs, tolerance)
    except SparsecError as error:
        if NO_KERNEL not in str(error) or "bfloat16" not in str(error):
            return Check(name, False, str(error))
        return _wide_outputs(name, path, check, tolerance, str(error))


def _wide_outputs(name: str, path: Path, check: CheckData, tolerance: float, error: str) -> Check:
    """Where onnxruntime has no bfloat16 kernels, the same graph is run in float32, and the check says so."""
    import torch

    inputs = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in check.inputs.items()}
    with tempfile.TemporaryDirectory(prefix="sparsec-onnx-") as scratch:
        widen(path, Path(scratch) / MODEL)
        try:
            found = compare(name, OnnxModule(Path(scratch) / MODEL)(**inputs), check.outputs, tolerance)
        except SparsecError as again:
            return Check(name, False, f"{error}; nor in float32: {again}")
    return Check(name, found.ok, f"{error}; what is proven is the same graph in float32: {found.detail}")
