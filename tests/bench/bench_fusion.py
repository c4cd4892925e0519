"""What fusion brings, and what more of it could: python tests/bench/bench_fusion.py

One thread, thread CPU time, interleaved, the fastest tenth of many. MiniLM at 64:2:8, whole:
  unfused      activations as operators of their own; the ratio is unfused / fused
  residual     a bound: the fused model with its residual additions left out (wrong numbers), as if they were free
  q, k, v      a bound: three products of one input as one product of the stacked weights, in every layer
  copies       a bound: no layer copies its activations into panels or results back. The part of a layer's time that
               does not grow with its rows, from layers of 64 and of all rows; it holds the call's overhead too
One call: what `stream_linear` adds to the C function on a 384 x 384 layer and one token.
Exit status 1 when fusion costs time, or a call more than its goal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from sparsec import _fx, api
from sparsec.backends.kernel import install
from sparsec.backends.kernel.cpu import library, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.layout import compress
from sparsec.pattern import Pattern

PATTERN = Pattern.parse("64:2:8")
SIZES = ((1, 1), (1, 16), (1, 128), (8, 128))  # batch x length
WIDTH, LAYERS = 384, 6
SHAPES = {(WIDTH, WIDTH): 4 * LAYERS, (4 * WIDTH, WIDTH): LAYERS, (WIDTH, 4 * WIDTH): LAYERS}
MIN_RATIO = 0.98  # unfused / fused: noise of the clock
MAX_OVERHEAD = 4e-6  # seconds over the C function
SECONDS = 6.0


def fastest(calls: dict[str, Callable[[], object]], seconds: float = SECONDS, in_a_row: int = 1) -> dict[str, float]:
    """CPU seconds of one call, by name: the fastest tenth, each going first in its turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, end = list(calls), time.monotonic() + seconds
    while time.monotonic() < end:
        order.append(order.pop(0))
        for name in order:
            start = time.thread_time()
            for _ in range(in_a_row):
                calls[name]()
            samples[name].append((time.thread_time() - start) / in_a_row)
    return {name: sorted(taken)[len(taken) // 10] for name, taken in samples.items()}


def layer(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Stream and bias of a random layer."""
    weight = torch.randn(1, rows, cols)
    return stream.pack(compress(weight, PATTERN, PATTERN.project(weight.abs(), "l1"))), torch.randn(rows)


def without_residuals(model: torch.nn.Module) -> torch.nn.Module:
    """The graph with each `layer(x) + r` replaced by `layer(x)`."""
    graph = model.graph
    for node in _fx.calls(graph.graph, torch.ops.aten.add.Tensor):
        for read in node.all_input_nodes:
            if read.target == stream_linear:
                _fx.replace(node, read)
                break
    _fx.prune_unused(graph)
    graph.recompile()
    return model


def shared_input(tokens: int) -> float:
    """Seconds that one product instead of three would save in the whole model."""
    x, three, (one, bias) = torch.randn(1, tokens, WIDTH), [layer(WIDTH, WIDTH) for _ in "qkv"], layer(3 * WIDTH, WIDTH)
    taken = fastest(
        {
            "three": lambda: [stream_linear(x, packed, b, WIDTH) for packed, b in three],
            "one": lambda: torch.split(stream_linear(x, one, bias, 3 * WIDTH), WIDTH, -1),
        },
        SECONDS / 2,
        max(1, 256 // tokens),
    )
    return LAYERS * (taken["three"] - taken["one"])


def copies(tokens: int) -> float:
    """Seconds of the whole model's sparse layers that do not grow with their rows."""
    total = 0.0
    for (rows, cols), count in SHAPES.items():
        x, (few, few_bias), (all_, bias) = torch.randn(tokens, cols), layer(64, cols), layer(rows, cols)
        taken = fastest(
            {
                "few": lambda x=x, few=few, b=few_bias: stream_linear(x, few, b, 64),
                "all": lambda x=x, all_=all_, b=bias, rows=rows: stream_linear(x, all_, b, rows),
            },
            SECONDS / 3,
            max(1, 256 // tokens),
        )
        total += count * (taken["few"] * rows - taken["all"] * 64) / (rows - 64)
    return total


def overhead() -> tuple[float, float]:
    """Seconds of the C function and of `stream_linear`."""
    (packed, bias), x, y = layer(WIDTH, WIDTH), torch.randn(1, WIDTH), torch.empty(1, WIDTH)
    function = library.library().sparsec_linear
    values = (
        packed.data_ptr(), packed.numel(), x.data_ptr(), bias.data_ptr(), y.data_ptr(), 1, WIDTH, WIDTH,
        0, 0, 1, library.supported().index(library.level()),
    )  # fmt: skip
    ready = [kind(value) for kind, value in zip(function.argtypes, values, strict=True)]
    calls = {"C": lambda: function(*ready), "call": lambda: stream_linear(x, packed, bias, WIDTH)}
    taken = fastest(calls, SECONDS / 2, 50)
    return taken["C"], taken["call"]


def main() -> int:
    """Measure, print and check the goals."""
    if library.level() is None:
        print(f"cannot measure: {library.unavailable_reason()}")
        return 1
    torch.set_num_threads(1)
    print(f"{library.level()}, 1 thread, MiniLM {PATTERN}\n\ntokens   fused ms  unfused  residual  q, k, v  copies")
    worst = float("inf")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        artifact = api.compile("demo:minilm", pattern=str(PATTERN), out=Path(folder) / "minilm.sparsec")
        models = {"fused": artifact.load(), "residual": without_residuals(artifact.load())}
        with mock.patch.object(install, "fuse_activations"):
            models["unfused"] = artifact.load()
        for batch, length in SIZES:
            ids = torch.randint(1000, 20000, (batch, length))
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            taken = fastest(
                {name: lambda model=model, inputs=inputs: model(**inputs) for name, model in models.items()}
            )
            whole, tokens = taken["fused"], batch * length
            bounds = (whole - taken["residual"], shared_input(tokens), copies(tokens))
            shares = "".join(f"{100 * saved / whole:8.1f}%" for saved in bounds)
            print(f"{batch} x {length:<5}{whole * 1e3:9.2f}{taken['unfused'] / whole:8.3f}x{shares}", flush=True)
            worst = min(worst, taken["unfused"] / whole)
        native, call = overhead()
    added = call - native
    print(f"\none call: {native * 1e6:.1f} us in C, {added * 1e6:.1f} us added by stream_linear")
    return 0 if worst >= MIN_RATIO and added <= MAX_OVERHEAD else 1


if __name__ == "__main__":
    sys.exit(main())
