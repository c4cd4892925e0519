"""`compile` for an .onnx file: prune its weights by magnitude where they lie, without data or training, and prove it.

1. Only the values of weights change. Nodes stay as they are, byte for byte; an initializer that nothing reads goes.
2. Quality and the stored check outputs come from onnxruntime, on small inputs made from the types of the graph's
   inputs. Where the file cannot be run on such inputs, the manifest says why and only the structure is proven. A file
   that runs and does not satisfy onnx's checker is taken, and the manifest says so.
3. What needs a traced graph is refused: see `onnxrequest`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsec import registry, store
from sparsec.artifact import Artifact, prove_written
from sparsec.backend import CHECK_FILE, FORMAT, FP32_TOLERANCE, CheckData
from sparsec.columns import Solver
from sparsec.description import card, describe_quality
from sparsec.errors import ArtifactError, PatternError, UsageError, VerificationError
from sparsec.onnxfile import running
from sparsec.onnxfile.checks import checker_fault
from sparsec.onnxfile.opened import OnnxFile, dtype_of, nbytes_of, tensors_of
from sparsec.onnxfile.weights import Stored, Survey, Weight, survey
from sparsec.onnxfile.writing import write
from sparsec.onnxrequest import resolved
from sparsec.pattern import Pattern
from sparsec.pipeline import CLOSE_IN, Progress
from sparsec.quality import Quality, check_least, measure
from sparsec.recipe import Recipe
from sparsec.sites import Exclusion, Site, SiteTable
from sparsec.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

_MODEL = "model.onnx"
_STAGES = 4
_SAMPLES = 4
_SAMPLES_ARE = f"{_SAMPLES} small inputs made from the types of the graph's inputs"
_QUANTIZED_TOLERANCE = 2e-2  # another processor's kernels move a few activations to the next of 255 steps
_DENSE = (
    "onnxruntime has no kernel for sparse weights, so it multiplies the zeros too; a pruned file keeps its nodes, and "
    "TensorRT and others look for the zeros in place"
)


class _Run(NamedTuple):
    """What the original did in onnxruntime: inputs and outputs by name, or why it was not run (rule 2)."""

    samples: list[dict[str, Tensor]]
    outputs: list[dict[str, Tensor]]
    not_run: str = ""


def compile_onnx(
    recipe: Recipe, out: Path, force: bool, min_quality: float | None, allow_dense: bool, progress: Progress
) -> Artifact:
    """Prune the file that `recipe.model` names and write an artifact; see `sparsec.compile`. Raises a SparsecError."""
    recipe, columns = resolved(recipe)
    store.check_writable(out, force)
    progress("reading", 0, _STAGES)
    path = Path(recipe.model)
    file = OnnxFile(path)
    found = survey(file)
    table = _with_targets(found, recipe)
    if not allow_dense:
        table.refuse_silent()
    progress("running", 1, _STAGES)
    dense, fault = _run(file, recipe.seed), checker_fault(path)
    if fault and dense.not_run:
        raise ArtifactError(
            f"{path} is not valid ONNX ({fault}), and onnxruntime does not run it: {dense.not_run}; export it again"
        )
    with store.writing(out, force) as folder:
        progress("pruning", 2, _STAGES)
        manifest = _describe(file, found, recipe)
        manifest["backends"]["onnx"] |= {"invalid": fault} if fault else {}
        start, retained = time.perf_counter(), dict[str, float]()
        dropped = _write(file, folder / _MODEL, found, table, columns, retained)
        manifest["passes"] = [{"pass": recipe.passes, "seconds": round(time.perf_counter() - start, 3)}]
        weights = {weight.name: weight for weight in found.weights}
        manifest["sites"] = [_describe_site(site, weights[site.name], retained) for site in table]
        manifest["exclusions"] = [dataclasses.asdict(one) for one in table.exclusions if one.name not in dropped]
        manifest["dropped"] = dropped
        written = sum(entry.stat().st_size for entry in folder.iterdir())
        sparse = sum(site["nbytes_sparse"] for site in manifest["sites"] if site["pattern"])
        manifest["backends"]["onnx"] |= {"nbytes_sparse": sparse, "nbytes": written}
        progress("verifying", 3, _STAGES)
        manifest = _proven(folder, manifest, dense, min_quality)
        (folder / "README.md").write_text(card(manifest))
    progress("done", _STAGES, _STAGES)
    return Artifact.open(out)


def _with_targets(found: Survey, recipe: Recipe) -> SiteTable:
    """The weights as sites with their patterns. Raises UsageError for a selector that names what cannot be pruned."""
    packed = [
        Exclusion(weight.name, "packed", f"stored packed as {weight.packed} already")
        for weight in found.weights
        if weight.packed
    ]
    sites = [
        Site(w.name, w.source.view, w.users, w.role, w.kind, w.twins, w.excluded)
        for w in found.weights
        if isinstance(w.source, Stored)
    ]
    table = SiteTable(tuple(sites), (*found.exclusions, *packed))
    names = {site.name for site in sites}
    for selector in recipe.targets:
        if other := next((one for one in table.exclusions if one.name == selector and selector not in names), None):
            raise UsageError(f"{selector} cannot be given a pattern: {other.reason}")
    return table.with_targets(recipe.targets, recipe.include)


def _run(file: OnnxFile, seed: int) -> _Run:
    reason = running.why_not_runnable(file)
    if reason is None:
        try:
            module = registry.backend("onnx").load_file(file.path)
            samples = running.samples(file, module, _SAMPLES, seed)
            reason = running.usable(module, samples[0], _tolerance(file))
        except (UsageError, ArtifactError) as error:
            reason = str(error)
    return _Run([], [], reason) if reason else _Run(samples, [module(**one) for one in samples])


def _write(
    file: OnnxFile, out: Path, found: Survey, table: SiteTable, columns: Solver, retained: dict[str, float]
) -> list[str]:
    """Write the pruned file; fills in the share of magnitude that each site keeps. Returns what was dropped."""
    import json

    patterns = {site.name: site.pattern for site in table.sparse}
    edits = {
        weight.name: partial(_pruned, file, weight, pattern, columns, retained)
        for weight in found.weights
        if (pattern := patterns.get(weight.name))
    }
    said = {name: str(pattern) for name, pattern in patterns.items()}
    said |= {weight.name: str(weight.packed) for weight in found.weights if weight.packed}
    return write(file, out, edits, {"sparsec.version": __version__, "sparsec.patterns": json.dumps(said)})


def _pruned(file: OnnxFile, weight: Weight, pattern: Pattern, columns: Solver, retained: dict[str, float]) -> Tensor:
    import torch

    size = weight.read(file).abs().float()
    total = float(size.sum())
    if not math.isfinite(total):
        raise PatternError(f"{weight.name}: the weight holds NaN or Inf; repair the file before pruning it")
    _, mask = pattern.choose(size, columns)
    retained[weight.name] = float(torch.where(mask, size, 0.0).sum()) / total if total else 1.0
    assert isinstance(weight.source, Stored)
    return weight.source.pruned(file, mask)


def _describe(file: OnnxFile, found: Survey, recipe: Recipe) -> dict[str, Any]:
    """The manifest's part that is known before the file is edited."""
    packed = any(weight.packed for weight in found.weights)
    return {
        "source": {"model": file.path.stem, "format": "onnx", "sha256": store.sha256(file.path), "opset": file.opset},
        "recipe": recipe.model_dump(mode="json"),
        "inputs": [{"name": v.name, "type": running.type_of(v)} for v in running.open_inputs(file)],
        "outputs": [value.name for value in file.model.graph.output],
        "dims": {},
        "values": {"type": "fp32"},
        "tolerance": _tolerance(file),
        "nbytes": {"dense_model": sum(nbytes_of(tensor) for _, tensor in tensors_of(file.model))},
        "backends": {"onnx": {"imported": True, "weights": "packed" if packed else "dense", "opset": file.opset}},
    }


def _describe_site(site: Site, weight: Weight, retained: dict[str, float]) -> dict[str, Any]:
    assert isinstance(weight.source, Stored)
    nbytes, pattern = nbytes_of(weight.source.tensor), site.pattern
    return {
        "name": site.name,
        "role": site.role,
        "kind": site.kind,
        "users": list(site.users),
        "same_bytes": list(weight.twins),
        "shape": list(site.shape),
        "view": dataclasses.asdict(site.view),
        "pattern": str(pattern) if pattern else None,
        "words": pattern.words if pattern else None,
        "excluded": site.excluded,
        "retained": retained.get(site.name),
        "values": weight.dtype if pattern else None,
        "nbytes_dense": nbytes,
        "nbytes_sparse": nbytes if pattern else None,  # zeros in place
        "verdicts": {"onnx": {"sparse": False, "kernel": "dense", "reason": _DENSE}} if pattern else {},
    }


def _tolerance(file: OnnxFile) -> float:
    """What another processor may change of the outputs, relative to the largest: by the coarsest arithmetic."""
    if any("Quantize" in node.op_type or "Integer" in node.op_type for node in file.main.nodes):
        return _QUANTIZED_TOLERANCE
    types = {dtype_of(tensor) for _, tensor in tensors_of(file.model)}
    return max((CLOSE_IN[name] for name in types & CLOSE_IN.keys()), default=FP32_TOLERANCE)


def _proven(folder: Path, manifest: dict[str, Any], dense: _Run, min_quality: float | None) -> dict[str, Any]:
    """Measure, store check data, verify from disk and seal; returns the sealed manifest."""
    reason, check = dense.not_run, CheckData({}, {})
    if not reason:
        outputs = _outputs(folder, manifest, dense.samples)
        check = CheckData(dense.samples[0], outputs[0])
        manifest["quality"] = _quality(dense, outputs, min_quality)
    elif min_quality is not None:
        raise VerificationError(f"--min-quality {min_quality} cannot be judged: {reason}; nothing written")
    else:
        manifest["backends"]["onnx"]["not_run"] = reason
        manifest["quality"] = _not_measured(reason)
    store.save_tensors(folder / CHECK_FILE, check.tensors())
    prove_written(folder, manifest)
    manifest = store.seal(folder, FORMAT, manifest)
    store.read(folder, FORMAT)
    return manifest


def _outputs(folder: Path, manifest: dict[str, Any], samples: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What the written file gives. The session ends here: it holds the whole model, and verifying opens another."""
    module = registry.backend("onnx").load(folder, manifest)
    return [module(**one) for one in samples]


def _quality(dense: _Run, outputs: Sequence[dict[str, Tensor]], min_quality: float | None) -> dict[str, Any]:
    expected, found = iter(dense.outputs), iter(outputs)
    measured: Quality = measure(lambda **_: next(found), lambda **_: next(expected), dense.samples)
    if not measured.output or not math.isfinite(measured.cosine + measured.relative_error):
        reason = "it gives NaN or Inf on them" if measured.output else "no output is a floating-point number"
        if min_quality is not None:
            raise VerificationError(f"--min-quality {min_quality} cannot be judged: {reason}; nothing written")
        return _not_measured(reason)
    check_least(measured, min_quality)
    return describe_quality(measured, _SAMPLES_ARE)


def _not_measured(reason: str) -> dict[str, Any]:
    figures = dict.fromkeys(("cosine", "relative_error", "embedding_cosine"))
    return {**figures, "output": "", "samples": _SAMPLES_ARE, "words": f"not measured: {reason}"}
