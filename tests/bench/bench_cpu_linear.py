"""Speed of the CPU kernels against dense, one thread: python tests/bench/bench_cpu_linear.py [--json] [--quick]

A ratio is to the best of two dense peers: torch's F.linear, and what torch.compile's freezing emits, mkldnn's linear on
a weight it has reordered for the token count. SPARSEC_ISA=avx2 restricts the peers to AVX2 as well.
Times are thread CPU time (other tenants' time is not counted), interleaved, the fastest tenth of many (the very fastest
is wrong now and then: the clock of a virtual machine skips). Every call takes the next of enough copies of its weight
to fill COLD_BYTES, on every side: none finds its weight in a cache because it was just used, as when a model goes
through its layers, and none gains by being small enough to stay in one.
Exit status 1 when a must is missed that KNOWN_MISSES does not list, or when one of those gets worse. Musts are
geometric means over SHAPES; LARGE is recorded beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable

if os.environ.get("SPARSEC_ISA") == "avx2":  # read when torch is loaded
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
    os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu import library, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.layout import Values, compress, stored_as
from sparsec.pattern import Pattern

SHAPES = ((768, 768), (3072, 768), (768, 3072), (384, 1536))  # rows x cols
LARGE = (4096, 4096)
TOKENS = (1, 32, 128, 512)
PATTERNS = ("2:4", "64:2:5", "1:4", "64:2:8", "64:2:16")
# (tokens, values) -> pattern by pattern, what must be reached and what we stretch for.
GOALS: dict[tuple[int, Values], tuple[tuple[float, float], ...]] = {
    (1, "fp32"): ((1.7, 1.85), (2.0, 2.25), (3.0, 3.6), (3.0, 3.6), (5.5, 7)),
    (1, "bf16"): ((3.0, 3.4), (3.6, 4.2), (5, 6.3), (5, 6.3), (9, 12)),
    (32, "fp32"): ((1.6, 2.0), (1.9, 2.5), (3.0, 3.8), (3.0, 3.8), (5, 7)),
    (128, "fp32"): ((1.35, 1.6), (1.6, 2.0), (2.3, 2.9), (2.3, 2.9), (3.5, 5)),
    (512, "fp32"): ((1.2, 1.5), (1.4, 1.8), (2.0, 2.6), (2.0, 2.6), (3.2, 4.7)),
}
# Musts that are missed, explained in docs/results/cpu.md, and what is reached instead less what two runs differ by:
# by level, (tokens, values) -> pattern by pattern, None where the must holds.
KNOWN_MISSES: dict[str, dict[tuple[int, Values], tuple[float | None, ...]]] = {
    "avx2": {(32, "fp32"): (1.35, 1.7, 2.65, 2.7, None)},
    "avx512": {
        (1, "fp32"): (1.2, 1.5, 2.35, 2.4, 4.4),
        (1, "bf16"): (1.95, 2.4, 3.7, 3.8, 7.2),
        (32, "fp32"): (1.0, 1.3, 2.0, 2.15, 4.1),
        (128, "fp32"): (1.2, 1.5, 2.2, None, None),
        (512, "fp32"): (1.07, 1.3, 1.9, 1.9, 3.0),
    },
}
KNOWN_OVERHEAD = 7.0  # microseconds
OVERHEAD_MICROSECONDS = 4.0  # of a call of a 384 x 384 layer with 1 token, over the C function
DENSE = ("F.linear", "mkldnn")
COLD_BYTES = 32 << 20  # of all copies of a weight: beyond what the last-level cache leaves to one side
SECONDS_PER_CALL = 0.25
MIN_ROUNDS = 8
CALLS_IN_A_ROW = 3

Call = Callable[[Tensor, int], Tensor]
Seconds = dict[str, float]  # of one call, by name: a dense peer, or "pattern values"


def dense_calls(rows: int, cols: int, tokens: int) -> dict[str, Call]:
    """The peers: name -> function of (x, number of the copy)."""
    dense = [torch.randn(rows, cols) / cols**0.5 for _ in range(copies_of(rows * cols * 4))]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, tokens) for weight in dense]
    return {
        "F.linear": lambda x, i: torch.nn.functional.linear(x, dense[i % len(dense)]),
        "mkldnn": lambda x, i: torch.ops.mkldnn._linear_pointwise(x, reordered[i % len(dense)], None, "none", [], ""),
    }


def prepared(rows: int, cols: int, tokens: int) -> dict[str, Call]:
    """The peers and all patterns."""
    calls, weight = dense_calls(rows, cols, tokens), torch.randn(1, rows, cols)
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        layout = compress(weight, pattern, pattern.project(weight.abs(), "l1"))
        for values in (values for count, values in GOALS if count == tokens):
            first = stream.pack(stored_as(layout, values))
            streams = [first, *(first.clone() for _ in range(copies_of(first.nbytes) - 1))]
            calls[f"{text} {values}"] = lambda x, i, s=streams: stream_linear(x, s[i % len(s)], None, rows)
    return calls


def copies_of(nbytes: int) -> int:
    """How many copies of a weight a call rotates through."""
    return -(-COLD_BYTES // nbytes)


def measure(rows: int, cols: int, tokens: int, seconds: float) -> Seconds:
    """CPU seconds of one call, by name."""
    return interleaved(prepared(rows, cols, tokens), torch.randn(tokens, cols), seconds)


def interleaved(calls: dict[str, Call], x: Tensor, seconds: float) -> Seconds:
    """The same for any calls. `seconds`: to spend on each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.monotonic() + seconds * len(calls), 0
    while rounds < MIN_ROUNDS or time.monotonic() < end:
        for name, call in calls.items():
            for i in range(CALLS_IN_A_ROW):
                start = time.thread_time()
                call(x, rounds * CALLS_IN_A_ROW + i)
                samples[name].append(time.thread_time() - start)
        rounds += 1
    return {name: sorted(taken)[len(taken) // 10] for name, taken in samples.items()}


def overhead() -> float:
    """Microseconds that a call takes beyond the C function, 384 x 384, 1 token, everything in caches."""
    pattern, weight = Pattern.parse("64:2:5"), torch.randn(1, 384, 384)
    packed, x = stream.pack(compress(weight, pattern, pattern.project(weight.abs(), "l1"))), torch.randn(1, 384)
    bias, y, linear = torch.randn(384), torch.empty(1, 384), library.library().sparsec_linear
    level = library.LEVELS.index(library.level() or "portable")
    raw = (packed.data_ptr(), packed.numel(), x.data_ptr(), bias.data_ptr(), y.data_ptr(), 1, 384, 384, 0, 0, 1, level)
    fastest = [math.inf, math.inf]
    for _ in range(100):
        for which, call in enumerate((lambda: linear(*raw), lambda: stream_linear(x, packed, bias, 384))):
            start = time.perf_counter()
            for _ in range(200):
                call()
            fastest[which] = min(fastest[which], (time.perf_counter() - start) / 200)
    return (fastest[1] - fastest[0]) * 1e6


def best(row: Seconds) -> float:
    """Seconds of the faster dense peer."""
    return min(row[name] for name in DENSE)


def report(seconds: dict[tuple[int, int, int], Seconds], ratios: dict[tuple[int, Values, str], float]) -> str:
    """Two Markdown tables: ratios beside what they must reach, and every case."""
    lines = [f"level {library.level()}, 1 thread; times faster than the best dense (must / stretch)\n"]
    lines += ["| tokens, values | " + " | ".join(PATTERNS) + " |", "|---" * (1 + len(PATTERNS)) + "|"]
    for (tokens, values), goals in GOALS.items():
        cells = (f"{ratios[tokens, values, p]:.2f} ({must} / {stretch})"
                 for p, (must, stretch) in zip(PATTERNS, goals, strict=True))  # fmt: skip
        lines.append(f"| {tokens}, {values} | " + " | ".join(cells) + " |")
    lines += ["", "| rows x cols, tokens, values | F.linear us | mkldnn us | " + " | ".join(PATTERNS) + " |"]
    lines.append("|---" * (3 + len(PATTERNS)) + "|")
    for (rows, cols, tokens), row in seconds.items():
        for values in (values for count, values in GOALS if count == tokens):
            dense = " | ".join(f"{row[name] * 1e6:.0f}" for name in DENSE)
            cells = " | ".join(f"{best(row) / row[f'{p} {values}']:.2f}" for p in PATTERNS)
            lines.append(f"| {rows}x{cols}, {tokens}, {values} | {dense} | {cells} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print and check what must be reached."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--quick", action="store_true", help="a third of the time, without 4096 x 4096")
    arguments = parser.parse_args()
    if library.level() is None:
        print(library.unavailable_reason())
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shapes = SHAPES if arguments.quick else (*SHAPES, LARGE)
    patience = SECONDS_PER_CALL / 3 if arguments.quick else SECONDS_PER_CALL
    with torch.inference_mode():
        microseconds = overhead()
        seconds = {(r, c, t): measure(r, c, t, patience) for t in TOKENS for r, c in shapes}
    ratios = {
        (tokens, values, p): math.prod(
            best(seconds[r, c, tokens]) / seconds[r, c, tokens][f"{p} {values}"] for r, c in SHAPES
        ) ** (1 / len(SHAPES))
        for tokens, values in GOALS
        for p in PATTERNS
    }  # fmt: skip
    missed = [
        f"{p} {values} at T={tokens}: {ratios[tokens, values, p]:.2f} < {must}"
        for (tokens, values), goals in GOALS.items()
        for p, (must, _) in zip(PATTERNS, goals, strict=True)
        if ratios[tokens, values, p] < must
    ]
    known = KNOWN_MISSES.get(str(library.level()), {})
    worse = [
        f"{p} {values} at T={tokens}"
        for (tokens, values), goals in GOALS.items()
        for p, (must, _), reached in zip(PATTERNS, goals, known.get((tokens, values), (None,) * 5), strict=True)
        if ratios[tokens, values, p] < (reached or must)
    ]
    if microseconds > OVERHEAD_MICROSECONDS:
        missed.append(f"a call takes {microseconds:.1f} us over the C function > {OVERHEAD_MICROSECONDS}")
    if microseconds > KNOWN_OVERHEAD:
        worse.append("the overhead of a call")
    if arguments.json:
        print(json.dumps({
            "isa": library.level(), "threads": 1, "missed": missed, "worse": worse, "overhead_us": microseconds,
            "seconds": {f"{r}x{c} T={t}": row for (r, c, t), row in seconds.items()},
            "ratios": {f"{p} {values} T={t}": ratio for (t, values, p), ratio in ratios.items()},
        }))  # fmt: skip
        return bool(worse)
    print(report(seconds, ratios))
    print(f"\na call of a 384 x 384 layer, 1 token: {microseconds:.1f} us over the C function")
    print("musts: " + ("all reached" if not missed else "missed: " + "; ".join(missed)))
    if missed:
        print("worse than known misses (docs/results/cpu.md): " + (", ".join(worse) or "none"))
    return bool(worse)


if __name__ == "__main__":
    raise SystemExit(main())
