"""MiniLM in onnxruntime: dense weights, packed weights unpacked by onnxruntime, packed weights on sparsec's kernels.

    python tests/bench/bench_ort.py [--pattern 64:2:5] [--threads 1] [--seconds 5]

Interleaved, fastest tenth; one thread in thread CPU time, several in wall time. Also what a session takes to make and
holds, what the file and its sparse weights take, and how far the outputs are from torch's. Exit 1 where a bound is
missed: sparse weights of at most half the dense bytes, outputs within 1e-5 of torch (not with rounded values), and
sparsec's kernels faster than the dense file at every size.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from sparsec import ort, timing
from sparsec.backends.onnx.backend import Weights
from sparsec.backends.onnx.exporter import export
from sparsec.layout import VALUE_BYTES, Values, table_bytes
from sparsec.models import load_model
from sparsec.pipeline import PassManager
from sparsec.program import Program

SIZES = ((1, 16), (1, 128), (8, 128))  # batch, length
BYTES, DIFFERENCE = 0.5, 1e-5


@dataclass(frozen=True)
class Way:
    """A file and what runs it."""

    weights: Weights
    values: Values
    sparse: bool

    @property
    def file(self) -> str:
        return f"{self.weights}-{self.values}.onnx"


WAYS = {
    "dense": Way("dense", "fp32", False),
    "packed": Way("packed", "fp32", False),
    "sparsec": Way("packed", "fp32", True),
    "sparsec, bf16 values": Way("packed", "bf16", True),
}


def session(path: Path, threads: int, sparse: bool) -> tuple[Any, float, float]:
    """A session, the CPU seconds it took and the megabytes it holds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    start, held = time.process_time(), resident()
    make = ort.session if sparse else onnxruntime.InferenceSession
    made = make(str(path), options)
    return made, time.process_time() - start, resident() - held


def resident() -> float:
    """Megabytes of memory that this process holds."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random token numbers, none masked."""
    ids = np.random.default_rng(0).integers(0, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def difference(program: Program, made: Any) -> float:
    """The largest difference from torch at all sizes, relative to the largest output."""
    worst = 0.0
    for size in SIZES:
        with torch.no_grad():
            expected = program(**{name: torch.from_numpy(array) for name, array in tokens(*size).items()})
        for found, wanted in zip(made.run(None, tokens(*size)), expected.values(), strict=True):
            worst = max(worst, float(np.abs(found - wanted.numpy()).max() / wanted.abs().max()))
    return worst


def sparse_bytes(program: Program, way: Way) -> int:
    """Bytes of the weights that are sparse, as the file holds them."""
    if way.weights == "dense":
        return sum(4 * site.shape[1] * site.shape[2] for site in program.sites.sparse)
    one = VALUE_BYTES[way.values]
    return sum(table_bytes(site.pattern, site.shape, one) for site in program.sites.sparse if site.pattern)


def main() -> int:
    """Export MiniLM, run it in all ways, print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="64:2:5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if reason := ort.unavailable_reason():
        print(reason)
        return 1
    torch.set_num_threads(asked.threads)
    program = load_model("demo:minilm").program
    program = program.replace(sites=program.sites.with_targets({"*": asked.pattern}))
    program = PassManager.parse("mask | freeze").run(program)
    facts: dict[str, dict[str, float]] = {}
    sessions, missed = {}, []
    dense_bytes = sparse_bytes(program, WAYS["dense"])
    with tempfile.TemporaryDirectory() as scratch:
        for name, way in WAYS.items():
            path = Path(scratch) / way.file
            if not path.exists():
                export(program.clone(), path, way.weights, values=way.values)
            sessions[name], seconds, megabytes = session(path, asked.threads, way.sparse)
            ratio, far = sparse_bytes(program, way) / dense_bytes, difference(program, sessions[name])
            size = path.stat().st_size / 1e6
            facts[name] = {"file_mb": size, "bytes": ratio, "load_s": seconds, "holds_mb": megabytes, "difference": far}
            missed += [f"{name}: {ratio:.3f} of the dense bytes"] if way.weights == "packed" and ratio > BYTES else []
            missed += [f"{name}: {far:.1e} from torch"] if way.values == "fp32" and far > DIFFERENCE else []
        rows = {}
        for batch, length in SIZES:
            runs = {name: functools.partial(one.run, None, tokens(batch, length)) for name, one in sessions.items()}
            times = timing.judged(timing.interleaved(runs, asked.seconds), asked.threads)
            rows[f"{batch} x {length}"] = times
            missed += [f"{batch} x {length}: slower than dense"] if times["sparsec"] >= times["dense"] else []
    if asked.json:
        print(json.dumps({"pattern": asked.pattern, "files": facts, "seconds": rows, "missed": missed}))
        return int(bool(missed))
    clock = timing.clock(asked.threads)
    print(f"{asked.pattern}, {asked.threads} threads, {clock}, onnxruntime {onnxruntime.__version__}\n")
    print("| | file, MB | sparse weights, of dense | session in, s CPU | holds, MB | from torch |")
    print("|---" * 6 + "|")
    for name, row in facts.items():
        figures = f"{row['file_mb']:.1f} | {row['bytes']:.3f} | {row['load_s']:.2f} | {row['holds_mb']:.0f}"
        print(f"| {name} | {figures} | {row['difference']:.1e} |")
    print("\n| batch x length | " + " | ".join(f"{name}, ms" for name in WAYS) + " | dense / sparsec | bf16 |")
    print("|---" * (3 + len(WAYS)) + "|")
    for size_name, times in rows.items():
        cells = " | ".join(f"{1e3 * times[name]:.1f}" for name in WAYS)
        gains = [times["dense"] / times[name] for name in ("sparsec", "sparsec, bf16 values")]
        print(f"| {size_name} | {cells} | {gains[0]:.2f} | {gains[1]:.2f} |")
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
