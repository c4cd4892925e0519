"""MiniLM in onnxruntime: dense weights, packed weights unpacked by onnxruntime, packed weights on sparsec's kernels.

    python tests/bench/bench_ort.py [--pattern 64:2:8] [--threads 1] [--seconds 5]

Interleaved, fastest tenth; one thread in thread CPU time, several in wall time. Also seconds and resident megabytes of
making a session, and the size of the file. No bound: a figure to read.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime

from sparsec import ort, timing
from sparsec.backends.onnx.backend import Weights
from sparsec.backends.onnx.exporter import export
from sparsec.models import load_model
from sparsec.pipeline import PassManager

SIZES = ((1, 16), (1, 128), (8, 128))  # batch, length
WAYS: dict[str, tuple[Weights, bool]] = {
    "dense": ("dense", False),
    "packed": ("packed", False),
    "sparsec": ("packed", True),
}


def session(path: Path, threads: int, sparse: bool) -> tuple[Any, float, float]:
    """A session, the seconds it took and the megabytes it holds."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    start, held = time.perf_counter(), resident()
    make = ort.session if sparse else onnxruntime.InferenceSession
    made = make(str(path), options)
    return made, time.perf_counter() - start, resident() - held


def resident() -> float:
    """Megabytes of memory that this process holds."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def tokens(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random token numbers, none masked."""
    ids = np.random.default_rng(0).integers(0, 30000, (batch, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def main() -> int:
    """Export MiniLM both ways, run it three ways, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", default="64:2:8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each size")
    asked = parser.parse_args()
    if reason := ort.unavailable_reason():
        print(reason)
        return 1
    program = load_model("demo:minilm").program
    program = program.replace(sites=program.sites.with_targets({"*": asked.pattern}))
    program = PassManager.parse("mask | freeze").run(program)
    with tempfile.TemporaryDirectory() as scratch:
        files = {weights: Path(scratch) / f"{weights}.onnx" for weights in get_args(Weights)}
        for weights, path in files.items():
            export(program.clone(), path, weights)
        clock = timing.clock(asked.threads)
        print(f"{asked.pattern}, {asked.threads} threads, {clock}, onnxruntime {onnxruntime.__version__}\n")
        sessions = {}
        for name, (weights, sparse) in WAYS.items():
            sessions[name], seconds, megabytes = session(files[weights], asked.threads, sparse)
            size = files[weights].stat().st_size / 1e6
            print(f"{name}: file {size:.1f} MB, session in {seconds:.2f} s, holds {megabytes:.0f} MB")
        print("\n| batch x length | " + " | ".join(f"{name}, ms" for name in WAYS) + " | dense / sparsec |")
        print("|---" * (2 + len(WAYS)) + "|")
        for batch, length in SIZES:
            runs = {name: functools.partial(one.run, None, tokens(batch, length)) for name, one in sessions.items()}
            times = timing.judged(timing.interleaved(runs, asked.seconds), asked.threads)
            cells = " | ".join(f"{1e3 * times[name]:.1f}" for name in WAYS)
            print(f"| {batch} x {length} | {cells} | {times['dense'] / times['sparsec']:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
