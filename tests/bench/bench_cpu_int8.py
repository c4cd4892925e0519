"""Speed of the int8 kernels against onnxruntime int8, one thread: python tests/bench/bench_cpu_int8.py [--json]

The peer is what users would take instead: a MatMul after onnxruntime's own `quantize_dynamic` with its defaults (int8
weights, uint8 activations scaled at every call), dense. Times are thread CPU time, interleaved, the fastest tenth of
many. Every call takes the next of enough copies of its weight to fill COLD_BYTES, on both sides: none finds its weight
in a cache because it was just used, as when a model goes through its layers.
Exit status 1 when a goal is missed. Goals are geometric means over the shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import quantize_dynamic

from sparsec.backends.kernel.cpu import int8, library
from sparsec.layout import compress, stored_as
from sparsec.pattern import Pattern

SHAPES = ((768, 768), (3072, 768), (768, 3072), (384, 1536))  # rows x cols
TOKENS = (1, 32, 128, 512)
PATTERNS = ("64:2:8", "64:2:16")
GOALS = {("64:2:8", 128): 1.3, ("64:2:16", 128): 2.0}
COLD_BYTES = 32 << 20  # of all copies of a weight: beyond what the last-level cache leaves to one side
SECONDS_PER_CASE = 1.5
MIN_ROUNDS = 8
CALLS_IN_A_ROW = 3

Call = Callable[[torch.Tensor, int], object]


def sessions(weight: torch.Tensor) -> list[onnxruntime.InferenceSession]:
    """onnxruntime on copies of one quantized MatMul, one thread each."""
    rows, cols = weight.shape
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["t", d]) for n, d in (("x", cols), ("y", rows)))
    matmul = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([matmul], "linear", [x], [y], [numpy_helper.from_array(weight.T.numpy().copy(), "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder) / "plain.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, plain)
        quantize_dynamic(plain, quantized)
        data = quantized.read_bytes()
    return [
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        for _ in range(copies_of(rows * cols))
    ]


def prepared(rows: int, cols: int) -> dict[str, Call]:
    """name -> function of (x, number of the copy)."""
    weight = torch.randn(rows, cols) / cols**0.5
    made = sessions(weight)
    calls: dict[str, Call] = {"onnxruntime": lambda x, i: made[i % len(made)].run(None, {"x": x.numpy()})}
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        layout = compress(weight[None], pattern, pattern.project(weight.abs(), "l1"))
        first = int8.pack(stored_as(layout, "int8"))
        streams = [first, *(first.clone() for _ in range(copies_of(first.nbytes) - 1))]
        calls[text] = lambda x, i, streams=streams: int8.int8_linear(x, streams[i % len(streams)], None, rows)
    return calls


def copies_of(nbytes: int) -> int:
    """How many copies of a weight a call rotates through."""
    return -(-COLD_BYTES // nbytes)


def measure(calls: dict[str, Call], x: torch.Tensor) -> dict[str, float]:
    """CPU seconds of one call, by name."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.monotonic() + SECONDS_PER_CASE, 0
    while rounds < MIN_ROUNDS or time.monotonic() < end:
        for name, call in calls.items():
            for i in range(CALLS_IN_A_ROW):
                start = time.thread_time()
                call(x, rounds * CALLS_IN_A_ROW + i)
                samples[name].append(time.thread_time() - start)
        rounds += 1
    return {name: sorted(taken)[len(taken) // 10] for name, taken in samples.items()}


def main() -> int:
    """Measure, print and check the goals."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    as_json = parser.parse_args().json
    chosen = library.level()
    if chosen is None:
        print(library.unavailable_reason())
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    onnxruntime.set_default_logger_severity(3)
    seconds = {}
    with torch.inference_mode():
        for rows, cols in SHAPES:
            calls = prepared(rows, cols)
            for tokens in TOKENS:
                seconds[rows, cols, tokens] = measure(calls, torch.randn(tokens, cols))
    ratios = {
        (p, t): math.prod(seconds[r, c, t]["onnxruntime"] / seconds[r, c, t][p] for r, c in SHAPES) ** (1 / len(SHAPES))
        for p in PATTERNS
        for t in TOKENS
    }
    missed = [f"{p} at T={t}: {ratios[p, t]:.2f} < {goal}" for (p, t), goal in GOALS.items() if ratios[p, t] < goal]
    if as_json:
        print(json.dumps({
            "kernel": int8.kernel_name(chosen), "threads": 1, "missed": missed, "onnxruntime": onnxruntime.__version__,
            "seconds": {f"{r}x{c} T={t}": row for (r, c, t), row in seconds.items()},
            "ratios": {f"{p} T={t}": ratio for (p, t), ratio in ratios.items()},
        }))  # fmt: skip
        return bool(missed)
    print(
        f"int8 kernel {int8.kernel_name(chosen)}, 1 thread; times faster than onnxruntime {onnxruntime.__version__}\n"
    )
    print("| rows x cols, T | onnxruntime us | " + " | ".join(PATTERNS) + " |")
    print("|---" * (2 + len(PATTERNS)) + "|")
    for t in TOKENS:
        for r, c in SHAPES:
            row = seconds[r, c, t]
            cells = " | ".join(f"{row['onnxruntime'] / row[p]:.2f}" for p in PATTERNS)
            print(f"| {r}x{c}, {t} | {row['onnxruntime'] * 1e6:.0f} | {cells} |")
        print(f"| geometric mean, {t} | | " + " | ".join(f"{ratios[p, t]:.2f}" for p in PATTERNS) + " |")
    print("\ngoals: " + ("all reached" if not missed else "; ".join(missed)))
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
