"""The main job, `compile`: trace, prune, lower, emit, verify, measure. What the command line calls, and users too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import benchmark, data, mapping, quality, registry, resuming, store, tasks, timing
from sparsec.artifact import Artifact, prove_written
from sparsec.backend import CHECK_FILE, FORMAT, Backend, CheckData, tolerance_of
from sparsec.cost import TokenRange
from sparsec.description import card, describe, describe_quality, describe_values
from sparsec.errors import UsageError, VerificationError
from sparsec.normal_form import Dynamic
from sparsec.onnxcompile import compile_onnx
from sparsec.onnxrequest import BACKEND as ONNX_BACKEND
from sparsec.onnxrequest import is_onnx
from sparsec.pipeline import Context, PassManager, PassReport, Progress, no_progress, relative_difference
from sparsec.program import Program
from sparsec.recipe import DEFAULT_PASSES, WITH_DATA, WITHOUT_DATA, Dtype, Recipe, Task
from sparsec.refusals import check_backends, check_program, check_pruned, check_request
from sparsec.resolving import calibrate, drop_slow, resolved, with_passes
from sparsec.sources import GIVEN
from sparsec.tracing import trace

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsec.layout import Values
    from sparsec.loaded import Loaded

_STAGES = 6
_COMPARED_BYTES = 1 << 30  # of a model that is pruned by magnitude too, to compare


@dataclass(frozen=True)
class Options:
    """How to compile, beyond what the recipe fixes: nothing here changes a bit of graph.json or weights.safetensors."""

    force: bool = False
    trust: bool = False
    min_quality: float | None = None
    """Least cosine with the dense original; below it the compile fails."""
    allow_dense: bool = False
    """Accept sites that are neither sparse nor excluded with a reason."""
    measure_speed: bool = True
    resume: bool = False
    """Go on with the work that an interrupted compile of the same recipe to the same place left."""
    progress: Progress = field(default=no_progress)


def compile(
    model: nn.Module | str,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    out: str | Path,
    pattern: str | None = None,
    targets: Mapping[str, str] | None = None,
    include: Sequence[str] = (),
    passes: str = DEFAULT_PASSES,
    backends: Sequence[str] | None = None,
    values: Values = "fp32",
    dtype: Dtype = "fp32",
    seed: int = 0,
    dynamic: Dynamic | None = None,
    calibration: str | Iterable[Mapping[str, Tensor]] | None = None,
    num_calibration_samples: int = data.SAMPLES,
    max_seq_length: int = data.LENGTH,
    text_columns: Sequence[str] = (),
    train: str = "",
    evaluation: str = "",
    label_column: str = "",
    bias: Literal["", "columns", "overlap"] = "",
    task: Task = "",
    weights: str = "",
    resources: Mapping[str, Any] | None = None,
    options: Options | None = None,
) -> Artifact:
    """Compile a model to an artifact folder and prove it. Returns the opened artifact.

    `model`: a module, with `example_inputs` by name or position, or MODEL text as on the command line. `backends`:
    default kernel; an .onnx file has no other than onnx. `pattern` goes
    to every site that is not excluded; `targets` (selector -> pattern or `ignore`) adds to it or replaces it.
    `values`: how sparse weights are stored; bf16 and int8 are smaller and faster, and rounded. `dtype`: what a Hugging
    Face model that is named by text is loaded in. `calibration`: for passes that look at activations, DATA text as on
    the command line (then the three options after it count), or input dicts, whose content the recipe names by hash.
    `train`, `evaluation`: DATA text with labels, to train on and to judge by. `task`, `bias`, `weights`: as --task etc.
    `resources`: objects that options of passes name, such as the batches `train` of a training pass (docs/training.md).
    Raises a SparsecError whose text says what was found, expected and to do; `out` is then untouched.
    """
    from sparsec.loaded import Loaded

    goals = {**({"*": pattern} if pattern else {}), **(targets or {})}
    name = model if isinstance(model, str) else type(model).__name__
    backends = backends if backends is not None else (ONNX_BACKEND,) if is_onnx(name) else ("kernel",)
    given = None if calibration is None or isinstance(calibration, str) else data.given(calibration)
    fields: dict[str, Any] = {"model": name, "targets": goals, "include": include, "passes": passes}
    fields |= {"backends": backends, "values": values, "dtype": dtype, "seed": seed, "weights": weights}
    fields |= {"calib": f"{GIVEN}{given.sha256}" if given else calibration or "", "text_columns": text_columns}
    fields |= {"num_calibration_samples": num_calibration_samples, "max_seq_length": max_seq_length}
    fields |= {"train": train, "eval": evaluation, "label_column": label_column, "task": task, "bias": bias}
    recipe, options = Recipe.from_data(fields), options or Options()
    if isinstance(model, str):
        return compile_recipe(recipe, Path(out), options, given, resources)
    if example_inputs is None:
        raise UsageError("compile: a module needs example_inputs, tensors by name or by position")
    check_request(recipe, Path(out), options.force)
    work = tasks.prepare(recipe, resources or {}, None)
    program = trace(model, example_inputs, dynamic, origin={"model": name})
    tools = data.Tools(given=given, resources=resources or {})
    loaded = Loaded(program, (program.inputs,), "the example inputs", tools)
    return _compile(loaded, work, Path(out), options)


def compile_recipe(
    recipe: Recipe,
    out: Path,
    options: Options,
    calibration: data.Calibration | None = None,
    resources: Mapping[str, Any] | None = None,
) -> Artifact:
    """Compile what a recipe says; `calibration` takes the place of the data it names. See `compile`."""
    from sparsec.models import hub_location, load_model

    if is_onnx(recipe.model):
        return _compile_file(recipe, out, options, calibration, resources)
    check_request(recipe, out, options.force)
    work = tasks.prepare(recipe, resources or {}, hub_location(recipe.model))
    options.progress("tracing", 0, _STAGES)
    loaded = load_model(recipe.model, recipe.seed, options.trust, recipe.dtype, work.head, recipe.weights)
    tools = dataclasses.replace(loaded.tools, given=calibration, resources=resources or {})
    loaded = dataclasses.replace(loaded, tools=tools)
    return _compile(loaded, work, out, options)


def _compile_file(
    recipe: Recipe,
    out: Path,
    options: Options,
    calibration: data.Calibration | None,
    resources: Mapping[str, Any] | None,
) -> Artifact:
    given: dict[str, Any] = {"calibration data": calibration, "resources": resources}
    given |= {"--resume": options.resume, "--trust": options.trust, "--weights": recipe.weights}
    if wrong := [option for option, value in given.items() if value]:
        raise UsageError(
            f"{recipe.model}: {wrong[0]} has no meaning for an .onnx file, which is pruned by magnitude in one go; "
            "leave it out"
        )
    return compile_onnx(recipe, out, options.force, options.min_quality, options.allow_dense, options.progress)


def _compile(loaded: Loaded, work: tasks.Work, out: Path, options: Options) -> Artifact:
    from sparsec.training import distributed

    recipe = work.recipe
    backends = check_request(recipe, out, options.force)
    check_program(loaded.program, recipe, backends)
    if loaded.head and options.min_quality is not None:
        raise UsageError(
            f"--min-quality compares with the dense original, whose head is untrained ({loaded.head}); leave it out, "
            "and judge by --eval"
        )
    group = distributed.join()
    key = resuming.key_of(loaded.program, recipe.model_dump(mode="json"), work.named)
    with distributed.working(group, out, key, options.resume) as workdir:
        manifest = _compile_in(workdir, backends, loaded, work, options, None if group.rank else out)
        return Artifact(out, group.told(manifest))


def _compile_in(
    workdir: Path, backends: Sequence[Backend], loaded: Loaded, work: tasks.Work, options: Options, out: Path | None
) -> dict[str, Any]:
    """Run the passes, write the artifact and return its manifest; without `out`, nothing: another process does."""
    dense, recipe = loaded.program, work.recipe
    program = dense.replace(sites=dense.sites.with_targets(recipe.targets, recipe.include)) if recipe.targets else dense
    check_backends(program, backends)  # again: some patterns have no place in some backends
    if recipe.drop_slow:
        program, recipe = drop_slow(program, recipe, backends[0], options.progress)
    begun = work.begin(loaded, options.trust)
    options.progress("pruning", 1, _STAGES)
    samples = data.Deferred(dense, loaded.tools, recipe.data_request())
    own = {"calibration": samples, "backend": backends[0], "values": recipe.values}
    own["backends"] = tuple(one.name for one in backends)
    resources = {**loaded.tools.resources, **begun.resources, **own}
    context = Context(recipe.seed, options.progress, resources, backends[0].cost, workdir)
    asked, recipe = recipe, with_passes(recipe, samples.available, options.allow_dense)
    by_default = recipe is not asked
    program, reports = PassManager.parse(recipe.passes).run_reported(program, context)
    if out is None:
        return {}
    recipe, loaded = resolved(recipe, reports), loaded.judged_on(samples.made)
    check_pruned(program, options.allow_dense)
    tokens = TokenRange.parse(recipe.tokens) if recipe.tokens else None
    if tokens:
        calibrate(backends, program, recipe, options.progress)
    options.progress("measuring quality", 2, _STAGES)
    measured = _measure_quality(program, dense, loaded, options)
    manifest = describe(program, dense, recipe, measured, loaded.samples_are)
    manifest |= samples.describe(by_default) | begun.describe()
    manifest["quality"] |= begun.quality(program)
    if magnitude := _by_magnitude(program, dense, reports, loaded):
        manifest["quality"]["magnitude"] = magnitude
    mapping.release(*dense.module.parameters())
    manifest["passes"] = [{"pass": r.text, "seconds": round(r.seconds, 3), **r.data} for r in reports]
    dense_bytes = sum(p.nbytes for p in dense.module.parameters())
    with store.writing(out, options.force) as folder:
        options.progress("writing", 3, _STAGES)
        manifest["nbytes"] = {"dense_model": dense_bytes}
        manifest["backends"] = {}
        for one in backends:
            emitted = one.emit(program, folder, recipe.values)
            entry = {"nbytes_sparse": emitted.nbytes_sparse, "nbytes": emitted.nbytes, **emitted.data}
            manifest["backends"][one.name] = entry
            for verdict in emitted.verdicts or one.plan(program, recipe.values, tokens):
                site = next(s for s in manifest["sites"] if s["name"] == verdict.site)
                site["verdicts"][one.name] = {key: getattr(verdict, key) for key in ("sparse", "kernel", "reason")}
        check = CheckData(program.inputs, _run(program, program.inputs))
        store.save_tensors(folder / CHECK_FILE, check.tensors())
        if recipe.values != "fp32":
            stored = backends[0].load(folder, manifest)
            measured = _measure_quality(stored, dense, loaded, options)
            manifest |= _measure_values(recipe, stored, program, loaded.samples)
            manifest["quality"] |= describe_quality(measured, loaded.samples_are) | begun.quality(stored)
        options.progress("verifying", 4, _STAGES)
        prove_written(folder, manifest)
        if options.measure_speed and "kernel" in manifest["backends"]:
            options.progress("timing", 5, _STAGES)
            manifest["speed"] = _speed(folder, manifest, program)
        manifest = store.seal(folder, FORMAT, manifest)
        store.read(folder, FORMAT)
        (folder / "README.md").write_text(card(manifest))
        for one in backends:
            one.finish(folder, manifest)
    options.progress("done", _STAGES, _STAGES)
    return Artifact.open(out).manifest


def _measure_quality(found: Any, dense: Program, loaded: Loaded, options: Options) -> quality.Quality:
    """How far `found` is from the dense original; raises VerificationError where that is too far."""
    measured = quality.measure(found, dense, loaded.samples)
    if not math.isfinite(measured.cosine + measured.relative_error):
        raise VerificationError(
            f"the model gives NaN or Inf on {loaded.samples_are}, so nothing can be proven; nothing written"
        )
    quality.check_least(measured, options.min_quality)
    return measured


def _by_magnitude(
    program: Program, dense: Program, reports: Sequence[PassReport], loaded: Loaded
) -> dict[str, Any] | None:
    """What pruning by plain magnitude to the same patterns would have given, to compare with what calibration gave."""
    calibrated = any(report.text.partition("{")[0] == WITH_DATA for report in reports)
    if (
        not calibrated
        or "trained" in program.facts
        or sum(p.nbytes for p in dense.module.parameters()) > _COMPARED_BYTES
    ):
        return None
    sites = [dense.sites[s.name].replace(pattern=s.pattern, excluded=s.excluded) for s in program.sites]
    other = PassManager.parse(WITHOUT_DATA).run(dense.with_sites(sites))
    found = quality.measure(other, dense, loaded.samples)
    return {"cosine": found.cosine, "relative_error": found.relative_error, "embedding_cosine": found.embedding}


def _measure_values(recipe: Recipe, stored: Any, masked: Program, samples: Any) -> dict[str, Any]:
    """What storing rounded weights changed: the artifact, as loaded from disk, against the masked graph."""
    loss = quality.measure(stored, masked, samples)
    difference = 0.0
    for inputs in (*samples, masked.inputs):  # the last are those that verification runs
        found, expected = _run(stored, inputs), _run(masked, inputs)
        difference = max(difference, *(relative_difference(found[key], value) for key, value in expected.items()))
    if not math.isfinite(difference):
        raise VerificationError(
            f"with --values {recipe.values} the model gives NaN or Inf where it did not before; nothing written"
        )
    return describe_values(recipe.values, loss, difference, tolerance_of(masked))


def _run(program: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    with torch.no_grad():
        outputs: dict[str, Tensor] = program(**inputs)
    return outputs


def _speed(folder: Path, manifest: dict[str, Any], program: Program) -> list[dict[str, Any]]:
    """Seconds of the dense program and of the kernel artifact, whole model, for several token counts."""
    import torch

    runs = {benchmark.OURS: registry.backend("kernel").load(folder, manifest), "dense": program}
    with torch.inference_mode():
        cases = benchmark.cases_of_tokens(program.inputs, manifest, timing.TOKENS)
        return [benchmark.measure(runs, case, seconds=0.7) for case in cases]
