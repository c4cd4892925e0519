"""Speed of the CPU kernels against dense, one thread: python tests/bench/bench_cpu_linear.py [--json]

Compared with torch's F.linear, and with what torch.compile's freezing emits: mkldnn's linear on a weight it has
reordered for the token count. Times are thread CPU time (other tenants' time is not counted), interleaved, the fastest
tenth of many (the very fastest is wrong now and then: the clock of a virtual machine skips). Every call takes the next
of enough copies of its weight to fill COLD_BYTES, on every side: none finds its weight in a cache because it was just
used, as when a model goes through its layers, and none gains by being small enough to stay in one.
Exit status 1 when a goal is missed. Goals are geometric means over the shapes, against F.linear.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu import library, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.layout import compress
from sparsec.pattern import Pattern

SHAPES = ((768, 768), (3072, 768), (768, 3072))  # rows x cols
TOKENS = (1, 32, 128, 512)
PATTERNS = ("64:2:5", "64:2:8", "2:4")
GOALS = {("64:2:8", 1): 2.5, ("64:2:8", 128): 2.0, ("64:2:5", 1): 1.8, ("64:2:5", 128): 1.3, ("2:4", 128): 1.2}
COLD_BYTES = 32 << 20  # of all copies of a weight: beyond what the last-level cache leaves to one side
SECONDS_PER_CASE = 1.5
MIN_ROUNDS = 8
CALLS_IN_A_ROW = 3

Call = Callable[[Tensor, int], Tensor]


def prepared(rows: int, cols: int, tokens: int) -> dict[str, Call]:
    """name -> function of (x, number of the copy)."""
    dense = [torch.randn(rows, cols) / cols**0.5 for _ in range(copies_of(rows * cols * 4))]
    reordered = [torch.ops.mkldnn._reorder_linear_weight(weight, tokens) for weight in dense]
    calls: dict[str, Call] = {
        "F.linear": lambda x, i: torch.nn.functional.linear(x, dense[i % len(dense)]),
        "mkldnn": lambda x, i: torch.ops.mkldnn._linear_pointwise(x, reordered[i % len(dense)], None, "none", [], ""),
    }
    for text in PATTERNS:
        pattern = Pattern.parse(text)
        first = stream.pack(compress(dense[0][None], pattern, pattern.project(dense[0].abs(), "l1")))
        streams = [first, *(first.clone() for _ in range(copies_of(first.nbytes) - 1))]
        calls[text] = lambda x, i, streams=streams: stream_linear(x, streams[i % len(streams)], None, rows)
    return calls


def copies_of(nbytes: int) -> int:
    """How many copies of a weight a call rotates through."""
    return -(-COLD_BYTES // nbytes)


def measure(rows: int, cols: int, tokens: int) -> dict[str, float]:
    """CPU seconds of one call, by name."""
    calls, x = prepared(rows, cols, tokens), torch.randn(tokens, cols)
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
    if library.level() is None:
        print(library.unavailable_reason())
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        seconds = {(r, c, t): measure(r, c, t) for t in TOKENS for r, c in SHAPES}
    ratios = {
        (pattern, tokens, peer): math.prod(
            seconds[r, c, tokens][peer] / seconds[r, c, tokens][pattern] for r, c in SHAPES
        ) ** (1 / len(SHAPES))
        for pattern in PATTERNS
        for tokens in TOKENS
        for peer in ("F.linear", "mkldnn")
    }  # fmt: skip
    missed = [f"{p} at T={t}: {ratios[p, t, 'F.linear']:.2f} < {goal}" for (p, t), goal in GOALS.items()
              if ratios[p, t, "F.linear"] < goal]  # fmt: skip
    if as_json:
        print(json.dumps({
            "isa": library.level(), "threads": 1, "missed": missed,
            "seconds": {f"{r}x{c} T={t}": row for (r, c, t), row in seconds.items()},
            "ratios": {f"{p} T={t} vs {peer}": ratio for (p, t, peer), ratio in ratios.items()},
        }))  # fmt: skip
        return bool(missed)
    print(f"level {library.level()}, 1 thread; times faster than F.linear / than the best dense\n")
    print("| rows x cols, T | F.linear us | mkldnn us | " + " | ".join(PATTERNS) + " |")
    print("|---" * (3 + len(PATTERNS)) + "|")
    for (r, c, t), row in seconds.items():
        plain, best = row["F.linear"], min(row["F.linear"], row["mkldnn"])
        cells = " | ".join(f"{plain / row[p]:.2f} / {best / row[p]:.2f}" for p in PATTERNS)
        print(f"| {r}x{c}, {t} | {plain * 1e6:.0f} | {row['mkldnn'] * 1e6:.0f} | {cells} |")
    for t in TOKENS:
        cells = " | ".join(f"{ratios[p, t, 'F.linear']:.2f} / {ratios[p, t, 'mkldnn']:.2f}" for p in PATTERNS)
        print(f"| geometric mean, {t} (vs F.linear / mkldnn) | | | {cells} |")
    print("\ngoals: " + ("all reached" if not missed else "; ".join(missed)))
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
