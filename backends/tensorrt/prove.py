"""Prove on your GPU what an artifact's TensorRT engine gains: `python -m sparsec.backends.tensorrt.prove ARTIFACT`.

It builds the artifact's ONNX file twice, with sparse kernels allowed and without, reads which layers run sparse from
the verbose log, times both engines in turns, compares their outputs with the artifact's stored ones, and writes
tensorrt/proof.json, which `sparsec inspect` and `sparsec verify` show. It needs TensorRT 10 or 11, and the GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sparsec.artifact import Artifact
from sparsec.backends.tensorrt import building, proof
from sparsec.backends.tensorrt.backend import ENGINE, FOLDER, LOG, MODEL
from sparsec.backends.tensorrt.driver import Driver, Settings
from sparsec.backends.tensorrt.layers import Row, summary, table, to_json
from sparsec.backends.tensorrt.log import parse
from sparsec.backends.tensorrt.network import Network, targets_in
from sparsec.backends.tensorrt.session import TensorRTModule, check_gpu
from sparsec.errors import SparsecError, UsageError, VerificationError

if TYPE_CHECKING:
    from torch import Tensor

TURNS, RUNS, WARM_UP = 20, 20, 50


class Timed(Protocol):
    """An engine with inputs in place."""

    def milliseconds(self, runs: int) -> float:
        """GPU time of one run."""


def prove(path: Path, precision: str = "", turns: int = TURNS) -> dict[str, Any]:
    """Build, measure and write the proof; it is returned too. Raises UsageError saying what is missing here."""
    artifact = Artifact.open(path)
    facts = facts_of(artifact)
    driver = Driver("tensorrt")
    if reason := driver.cannot_build():
        raise UsageError(f"nothing can be proven here: {reason}")
    check_gpu()
    settings = settings_of(facts, precision)
    with tempfile.TemporaryDirectory(prefix="sparsec-prove-") as scratch:
        engines = {}
        for name, sparse in (("sparse", True), ("dense", False)):
            out = Path(scratch) / name
            out.mkdir()
            one = Settings(**{**vars(settings), "sparse": sparse})
            building.run(one, path / FOLDER / MODEL, out / ENGINE, out / LOG)
            plan = (out / ENGINE).read_bytes()
            inputs = [entry["name"] for entry in artifact.manifest["inputs"]]
            engines[name] = TensorRTModule(driver, plan, inputs, artifact.manifest["outputs"])
        text = (Path(scratch) / "sparse" / LOG).read_text()
    products = Network(path / FOLDER / MODEL).products(targets_in(artifact.manifest))
    rows = table(products, parse(text), "tensorrt", settings.precision)
    found = describe(rows, text) | {"tensorrt": driver.version, "precision": settings.precision, **_device()}
    found |= {"differs": _difference(engines["sparse"], artifact), "times": _times(engines, artifact, settings, turns)}
    proof.write(path / FOLDER, found)
    return found


def facts_of(artifact: Artifact) -> dict[str, Any]:
    """What the manifest says of its TensorRT part; raises UsageError where it has none."""
    if FOLDER not in artifact.manifest["backends"]:
        raise UsageError(
            f"{artifact.root} holds {', '.join(artifact.backends)}, not tensorrt; compile it with --backend tensorrt"
        )
    facts: dict[str, Any] = artifact.manifest["backends"][FOLDER]
    return facts


def settings_of(facts: Mapping[str, Any], precision: str = "") -> Settings:
    """How the artifact's engine was built, for TensorRT; with another precision where one is asked for."""
    chosen: Any = precision or facts["precision"]
    if chosen not in ("model", "fp16", "bf16"):
        raise UsageError(f"--precision {chosen!r}: expected model, fp16 or bf16")
    return Settings("tensorrt", precision=chosen, shapes=facts["shapes"])


def describe(rows: Sequence[Row], log: str) -> dict[str, Any]:
    """The proof's part about layers: the table, and the log's own words."""
    said = [line.strip() for line in log.splitlines() if "(Sparsity)" in line]
    return {"layers": summary(rows), "table": to_json(rows), "log": said}


def alternate(engines: Mapping[str, Timed], turns: int, runs: int = RUNS) -> dict[str, float]:
    """Median milliseconds of each engine, timed in turns, so that both meet the same clocks and temperatures."""
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for engine in engines.values():
        engine.milliseconds(WARM_UP)
    for turn in range(turns):
        names = list(engines) if turn % 2 == 0 else list(engines)[::-1]  # neither always follows the other
        for name in names:
            taken[name].append(engines[name].milliseconds(runs))
    return {name: statistics.median(times) for name, times in taken.items()}


def cases(inputs: Mapping[str, Tensor], shapes: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, dict[str, Tensor]]:
    """Inputs to time with, by their sizes: the stored ones repeated to the usual and the largest shapes."""
    import torch

    found = {}
    for which in (1, 2):
        resized = {}
        for name, value in inputs.items():
            for axis, size in enumerate(shapes[name][which] if name in shapes else value.shape):
                value = value.index_select(axis, torch.arange(size) % value.shape[axis])
            resized[name] = value
        label = ", ".join(f"{name} {'x'.join(map(str, value.shape))}" for name, value in resized.items())
        found[label] = resized
    return found


def _times(engines: Mapping[str, TensorRTModule], artifact: Artifact, settings: Settings, turns: int) -> list[Any]:
    found = []
    for sizes, inputs in cases(_check(artifact).inputs, settings.shapes).items():
        for engine in engines.values():
            engine.bound(inputs)
        times = alternate(engines, turns)
        found.append({"sizes": sizes, "dense_ms": times["dense"], "sparse_ms": times["sparse"], "turns": turns})
    return found


def _difference(engine: Callable[..., dict[str, Tensor]], artifact: Artifact) -> float:
    """The largest difference from the stored outputs, relative to the largest of each."""
    from sparsec.pipeline import relative_difference

    check = _check(artifact)
    outputs = engine(**check.inputs)
    found = max(relative_difference(outputs[name].float(), value.float()) for name, value in check.outputs.items())
    if not math.isfinite(found):
        raise VerificationError("the engine gives NaN or Inf where the stored outputs have none; nothing is proven")
    return found


def _check(artifact: Artifact) -> Any:
    from sparsec import store
    from sparsec.backend import CHECK_FILE, CheckData

    return CheckData.from_tensors(store.load_tensors(artifact.root / CHECK_FILE))


def _device() -> dict[str, Any]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return {"gpu": torch.cuda.get_device_name(), "compute_capability": f"{major}.{minor}", "cuda": torch.version.cuda}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its result is the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sparsec.backends.tensorrt.prove",
        description="Build an artifact's ONNX file with full TensorRT, and prove which layers run sparse and how fast.",
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--precision", default="", help="model, fp16 or bf16; default: the artifact's")
    parser.add_argument(
        "--turns", type=int, default=TURNS, help=f"turns that each engine is timed for; default {TURNS}"
    )
    given = parser.parse_args(arguments)
    try:
        found = prove(given.artifact, given.precision, given.turns)
    except SparsecError as error:
        print(f"prove: {error}", file=sys.stderr)
        return error.exit_code
    print(found["layers"])
    for row in found["table"]:
        state = "sparse" if row["chosen"] else "dense"
        print(f"  {row['site']}: {state}{': ' + row['why'] if row['why'] else ''}")
    for case in found["times"]:
        ratio = case["dense_ms"] / case["sparse_ms"]
        print(f"{case['sizes']}: {ratio:.2f}x ({case['dense_ms']:.3f} ms dense, {case['sparse_ms']:.3f} ms sparse)")
    print(f"largest relative difference from the stored outputs: {found['differs']:.1e}")
    print(f"written: {given.artifact / FOLDER / proof.PROOF}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
