"""Time torch's dense product and the sparse kernels side by side: what the cost model rests on.

Every call takes the next of many copies of its weight, and all series take turns: no weight is found in a cache because
it was just used, as when a model goes through its layers. One thread is timed in thread CPU time, which other programs
do not lengthen, several in wall time; the fastest fifth of the samples ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu import int8, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.layout import SparseLayout, Values, compress, stored_as
from sparsec.pattern import Dense, Pattern, SharedColumns, Strip
from sparsec.selection import Selection

_POOL_BYTES = 96 << 20  # of all copies of all series: several times what a core gets of a last-level cache
_MOST_COPIES = 256
_MIN_ROUNDS, _MOST_ROUNDS = 3, 200
_SAMPLE_SECONDS = 5e-5  # shorter calls are timed several at a time: reading a clock takes up to a microsecond

Call = Callable[[Tensor, int], Tensor]
"""One product with the i-th copy of a weight."""


class Bed:
    """Weights of one shape for several patterns, ready to be timed; it holds about 100 MB, reused between shapes."""

    def __init__(self, patterns: Sequence[Pattern], values: Values = "fp32") -> None:
        self.patterns, self.values = patterns, values
        self._pools = [torch.zeros(_POOL_BYTES // len(patterns), dtype=torch.uint8) for _ in patterns]

    def seconds(self, rows: int, cols: int, tokens: Sequence[int], budget: float) -> list[list[float]]:
        """Seconds of one product, by token count and then by pattern. `budget`: seconds to spend on each count."""
        made = zip(self.patterns, self._pools, strict=True)
        calls = [self._calls(pattern, pool, rows, cols) for pattern, pool in made]
        with torch.inference_mode():
            return [_interleaved(calls, torch.rand(count, cols), budget) for count in tokens]

    def _calls(self, pattern: Pattern, pool: Tensor, rows: int, cols: int) -> Call:
        if isinstance(pattern, Dense):
            first = (torch.rand(rows, cols) / cols).view(torch.uint8).flatten()
            copies = [part.view(torch.float32).view(rows, cols) for part in _copies(first, pool)]
            return lambda x, i: torch.nn.functional.linear(x, copies[i % len(copies)])
        layout = stored_as(_random_layout(pattern, rows, cols), self.values)
        if self.values == "int8":
            integers = _copies(int8.pack(layout), pool)
            return lambda x, i: int8.int8_linear(x, integers[i % len(integers)], None, rows)
        streams = _copies(stream.pack(layout), pool)
        return lambda x, i: stream_linear(x, streams[i % len(streams)], None, rows)


def _copies(first: Tensor, pool: Tensor) -> list[Tensor]:
    """Copies of a tensor of bytes, each at a multiple of 64 bytes, in a pool or, where it is too small, alone."""
    step = -(-first.numel() // 64) * 64
    count = min(pool.numel() // step, _MOST_COPIES)
    if count < 2:
        return [first, first.clone()]
    places = pool[: count * step].view(count, step)[:, : first.numel()]
    return list(places.copy_(first.expand_as(places)))


def _random_layout(pattern: Pattern, rows: int, cols: int) -> SparseLayout:
    """A weight of random values; one strip of rows is made and repeated, which a kernel cannot tell."""
    strip = min(rows, pattern.v if isinstance(pattern, SharedColumns) else 16)
    weight, repeats = torch.rand(1, strip, cols) / cols, -(-rows // strip)
    one = compress(weight, pattern, random_selection(pattern, weight))
    values = one.values.repeat(1, repeats, 1, 1)[:, :rows]
    columns = None if one.columns is None else one.columns.repeat(1, repeats, 1, 1)
    return SparseLayout(pattern, (1, rows, cols), values, one.positions.repeat(1, repeats, 1)[:, :rows], columns)


def random_selection(
    pattern: Pattern, score: Tensor, moved: bool = False, generator: torch.Generator | None = None
) -> Selection:
    """Of strips any columns, whose search takes long and no kernel can tell; else the best of a score (1, rows, cols).

    moved: the rows of a strip come from anywhere too.
    """
    if not isinstance(pattern, Strip):
        return pattern.project(score, "l1")
    _, rows, cols = score.shape
    spare = torch.arange(cols, cols + 4)  # of a weight with fewer columns than slots
    slots = 4 * pattern.groups(cols)
    mixed = (torch.randperm(cols, generator=generator) for _ in range(pattern.strips(rows)))
    columns = torch.stack([torch.cat([one, spare])[:slots] for one in mixed])
    order = torch.randperm(rows, generator=generator)[None] if moved else None
    return pattern.select(score, columns.view(1, len(columns), -1, 4), order)


def _interleaved(calls: Sequence[Call], x: Tensor, budget: float) -> list[float]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    in_a_row = [_warm(call, x, clock) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    end, rounds = time.perf_counter() + budget, 0
    while rounds < _MIN_ROUNDS or (time.perf_counter() < end and rounds < _MOST_ROUNDS):
        for call, count, taken in zip(calls, in_a_row, samples, strict=True):
            start = clock()
            for i in range(rounds * count, (rounds + 1) * count):
                call(x, i)
            taken.append((clock() - start) / count)
        rounds += 1
    return [sorted(taken)[len(taken) // 5] for taken in samples]


def _warm(call: Call, x: Tensor, clock: Callable[[], float]) -> int:
    """How many calls make one sample."""
    call(x, 0)
    start = clock()
    call(x, 1)
    return max(1, min(32, round(_SAMPLE_SECONDS / max(clock() - start, 1e-7))))
