"""What a user decides from: how close distilled MiniLM is to its dense self, against measured speed on one thread.

Of seed 0 of the study `distilled`, which keeps its programs and has to be run before. Both figures are of artifacts as
loaded from disk; of the dense model, what onnxruntime makes of it. Speed: times faster than dense fp32 torch,
interleaved with it as `sparsec bench` does it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

import sparsec
from examples.studies import distilled
from examples.studies.distilled import Run
from examples.studies.study import Arm, Line, Place, Start, Study, kept
from sparsec import Options, Program, benchmark
from sparsec.backends.onnx.exporter import export
from sparsec.benchmark import Case, size_of
from sparsec.errors import UsageError
from sparsec.layout import Values
from sparsec.peers import quantize

SIZES = ((8, 64), (1, 128))
SECONDS = 6.0  # of timing, for each size
SEED = 0
PEERS = ("onnxruntime fp32", "onnxruntime int8")
"""Of the dense model, beside torch."""
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#767676", "#767676")  # of Okabe and Ito, and grey


def arms() -> list[Arm]:
    """The dense model, then what `distilled` trained; int8 for the patterns that have int8 kernels."""
    passes = f"oneshot | {distilled.TRAINING}"
    made = [Arm(name, "", "dense", SEED) for name in PEERS]
    made += [Arm("trained", passes, pattern, SEED) for pattern in distilled.PATTERNS]
    made += [Arm("trained, int8", passes, pattern, SEED) for pattern in distilled.PATTERNS if pattern != "2:4"]
    permuted = f"{distilled.PERMUTE} | {passes}"
    return made + [Arm("permuted, trained", permuted, pattern, SEED) for pattern in distilled.PERMUTED]


def measure(arm: Arm, start: Start, place: Place) -> dict[str, float]:
    """Make what the arm runs, judge it and time it. Raises UsageError where a program was not kept."""
    with tempfile.TemporaryDirectory(dir=place.work) as scratch:
        made = peer if arm.arm in PEERS else ours
        run = made(arm, start.program, place, Path(scratch))
        found = dict(start.judge(run))
        torch.set_num_threads(1)
        for batch, length in SIZES:
            ids = torch.randint(1000, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
            case = Case(ids.numel(), distilled.inputs(start.program, ids), (batch, length))
            with torch.inference_mode():
                row = benchmark.measure({"dense": start.program, arm.arm: run}, case, SECONDS)
            found[size_of(row)] = row["seconds"]["dense"] / row["seconds"][arm.arm]
    return found


def ours(arm: Arm, dense: Program, place: Place, scratch: Path) -> Run:
    """An artifact of what `distilled` kept."""
    folder = kept(distilled.STUDY, arm, place)
    if not folder.exists():
        raise UsageError(f"{place.work} does not hold {arm.pattern}, {arm.arm}; run the study distilled before")
    values: Values = "int8" if arm.arm.endswith(", int8") else "fp32"
    passes = "mask | freeze"  # which changes nothing where all is chosen
    options = Options(measure_speed=False)
    out = scratch / "artifact"
    run: Run = sparsec.compile(str(folder), out=out, passes=passes, values=values, options=options).load()
    return run


def peer(arm: Arm, dense: Program, place: Place, scratch: Path) -> Run:
    """onnxruntime on the dense model, as exported, or after its dynamic quantization; one thread."""
    path = scratch / "fp32.onnx"
    export(dense.clone(), path, "dense")
    if arm.arm.endswith("int8"):
        quantize(path, scratch / "int8.onnx")
        path = scratch / "int8.onnx"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(**inputs: Tensor) -> dict[str, Tensor]:
        found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}

    return run


def plot(lines: Sequence[Line], folder: Path) -> None:
    """Embeddings over speed: a panel for each size of input."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    groups: dict[str, list[Line]] = {}
    for line in lines:
        groups.setdefault(line["arm"], []).append(line)
    # Text stays text in SVG, and equal figures give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsec", "font.size": 9}):
        figure = Figure(figsize=(9.5, 4.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        for panel, size in zip(figure.subplots(1, 2, sharey=True), SIZES, strict=True):
            key = size_of({"batch": size[0], "length": size[1]})
            panel.plot([1.0], [1.0], "s", color="#222222", label="torch fp32, dense")
            for colour, marker, (name, own) in zip(_COLOURS, "oDv^P", groups.items(), strict=False):
                points = sorted((line["metrics"][key], line["metrics"]["embedding"], line["pattern"]) for line in own)
                panel.plot([x for x, _, _ in points], [y for _, y, _ in points], marker, color=colour, label=name)
                for x, y, pattern in points:
                    words = pattern.removeprefix("64:") if pattern != "dense" else ""
                    panel.annotate(words, (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
            panel.set_title(f"{key}, 1 thread", loc="left", fontsize=10)
            panel.set_xlabel("times faster than dense fp32 torch")
            panel.spines[["top", "right"]].set_visible(False)
            panel.grid(color="#e5e5e5")
            panel.set_axisbelow(True)
        figure.axes[0].set_ylabel("cosine of sentence embeddings with the dense model's")
        figure.axes[0].legend(frameon=False, loc="lower left", fontsize=8)
        figure.savefig(folder / "accuracy-frontier.svg", metadata={"Date": None})


STUDY = Study(
    "frontier", arms(), distilled.start, ("embedding", *(f"{b} x {n} tokens" for b, n in SIZES)), page="accuracy.md",
    measure=measure, plot=plot, on_cpu="measures speed on the CPU",
)  # fmt: skip
