"""Speed of strips against windows of the same density and dense: python tests/bench/bench_cpu_strips.py [--quick]

One thread, timed as in bench_cpu_linear.py. A strip's columns come from anywhere in the row, so they are copied for
each strip before its rows are multiplied: `gathering` is how much longer a call takes than one of windows. `row table`
is how much longer it takes where rows moved too: 3 % are allowed. Exit status 1 when the geometric mean of a table's
cost over all shapes, patterns and token counts exceeds MOST_TABLE, or that of gathering MOST_GATHERING.
"""

from __future__ import annotations

import argparse
import math

import torch
from bench_cpu_linear import DENSE, SECONDS_PER_CALL, SHAPES, best, copies_of, dense_calls, interleaved

from sparsec.backends.kernel.cpu import library, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.measuring import random_selection
from sparsec.layout import compress
from sparsec.pattern import Pattern

TOKENS = (1, 8, 32, 128, 512)
PATTERNS = ("64:2:5", "64:2:8", "128:2:8")
MOST_TABLE = 1.03
MOST_GATHERING = 1.2


def measure(rows: int, cols: int, tokens: int, seconds: float) -> dict[str, float]:
    """CPU seconds of one call, by name: a dense peer, `64:2:5`, `64:2:5@strip`, `64:2:5@strip, rows`."""
    calls, weight = dense_calls(rows, cols, tokens), torch.randn(1, rows, cols)
    for text in PATTERNS:
        window, strip = Pattern.parse(text), Pattern.parse(f"{text}@strip")
        wanted = {text: (window, False), f"{strip}": (strip, False), f"{strip}, rows": (strip, True)}
        for name, (pattern, is_moved) in wanted.items():
            first = stream.pack(compress(weight, pattern, random_selection(pattern, weight.abs(), is_moved)))
            streams = [first, *(first.clone() for _ in range(copies_of(first.nbytes) - 1))]
            calls[name] = lambda x, i, s=streams: stream_linear(x, s[i % len(s)], None, rows)
    return interleaved(calls, torch.randn(tokens, cols), seconds)


def mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def main() -> int:
    """Measure, print and check the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a third of the time")
    arguments = parser.parse_args()
    if library.level() is None:
        print(library.unavailable_reason())
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    patience = SECONDS_PER_CALL / 3 if arguments.quick else SECONDS_PER_CALL
    print(f"level {library.level()}, 1 thread; times faster than the best of {', '.join(DENSE)}, means over")
    print(f"{', '.join(f'{r}x{c}' for r, c in SHAPES)}; in brackets how much longer a call takes\n")
    print("| tokens | pattern | window | strip (gathering) | with a row table (row table) |\n|---|---|---|---|---|")
    gathering, table = [], []
    for tokens in TOKENS:
        with torch.inference_mode():
            rows = [measure(r, c, tokens, patience) for r, c in SHAPES]
        for text in PATTERNS:
            names = (text, f"{text}@strip", f"{text}@strip, rows")
            speed = [mean([best(row) / row[name] for row in rows]) for name in names]
            gathering.append(speed[0] / speed[1])
            table.append(speed[1] / speed[2])
            print(f"| {tokens} | {text} | {speed[0]:.2f} | {speed[1]:.2f} ({gathering[-1] - 1:+.1%}) "
                  f"| {speed[2]:.2f} ({table[-1] - 1:+.1%}) |", flush=True)  # fmt: skip
    print(f"\ngathering {mean(gathering) - 1:+.1%}, row table {mean(table) - 1:+.1%}")
    return mean(table) > MOST_TABLE or mean(gathering) > MOST_GATHERING


if __name__ == "__main__":
    raise SystemExit(main())
