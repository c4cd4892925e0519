"""Seconds of a product by shape, pattern and token count: from a table measured on this machine, kept between runs.

A series is one kernel on one class of patterns; it is measured once, beside the dense product, on a grid of shapes and
token counts (about a second a series), and kept in $XDG_CACHE_HOME/sparsec under a name that stands for processor,
instruction set, thread count, library and torch. Between grid points the logarithm of the seconds a weight and token
is interpolated in the logarithms of rows, cols and tokens. Without a measurement a formula with rough constants
stands in, and says so: its figures are labelled "model".
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import platform
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sparsec.backends.kernel.calls import no_kernel
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.measuring import Bed
from sparsec.cost import DENSE, Basis, TokenRange, slow, speed
from sparsec.layout import Values
from sparsec.pattern import NM, VNM, Pattern
from sparsec.pipeline import Progress, no_progress

SIZES = (64, 256, 768, 3072)  # of rows and of cols
TOKENS = (1, 2, 4, 8, 16, 32, 128, 512)
_WHOLE = 768  # of a square weight that is measured at all token counts; larger ones follow it beyond _MOST_WORK
_MOST_WORK = _WHOLE * _WHOLE * TOKENS[-1]  # of one grid point, in weights times tokens
_POINT_SECONDS, _SHAPE_SECONDS = 0.01, 0.1  # to spend on one point of the grid; on one count of a shape
_SERIES_AT_ONCE = 5
_FORMAT = 1

Points = dict[tuple[int, int, int], float]
"""(rows, cols, tokens) -> seconds, on the whole grid."""

log = logging.getLogger("sparsec")


def series_of(pattern: Pattern, values: Values = "fp32") -> Pattern:
    """The pattern whose series stands for this one: V does not matter to the float kernels up to M = 16.

    It does to strips, whose columns are copied for every V rows: each has its own series.
    """
    if isinstance(pattern, VNM) and pattern.m <= 16 and values != "int8":
        return NM(pattern.n, pattern.m)
    return pattern


def seconds(shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
    """Seconds of (tokens, cols) times each matrix of a weight (batch, rows, cols), with torch's thread count of now."""
    batch, rows, cols = shape
    if basis(pattern, values) == "model":
        return _model(shape, pattern, tokens, values)
    return batch * interpolate(_table().series[_name(pattern, values)], rows, cols, tokens)


def basis(pattern: Pattern, values: Values = "fp32") -> Basis:
    """Whether `seconds` rests on a measurement: for the dense product, as soon as anything was measured."""
    return "measured" if _name(pattern, values) in _table().series else "model"


def too_slow(shape: tuple[int, int, int], pattern: Pattern, values: Values, tokens: TokenRange | None) -> str | None:
    """Why the dense kernel is to run a weight for these tokens, or None.

    int8 weights round their activations too, which is part of what the model computes: they have no dense kernel.
    """
    if tokens is None or values == "int8":
        return None
    found = basis(pattern, values)
    cost = seconds if found == "measured" else _model  # never a measured dense product against a modelled sparse one
    ratio = speed(cost, shape, pattern, tokens.counts, values)
    return slow(ratio, tokens, found) if ratio < 1 else None


def calibrate(patterns: Iterable[Pattern], values: Values = "fp32", progress: Progress = no_progress) -> None:
    """Measure what `seconds` needs for these patterns and is not known yet. Does nothing where no kernel runs."""
    if library.level() is None:
        return
    wanted = {_name(p, values): series_of(p, values) for p in patterns if no_kernel(p, values) is None}
    missing = [pattern for name, pattern in wanted.items() if name not in _table().series]
    for start in range(0, len(missing), _SERIES_AT_ONCE):
        _table().add(_measure([DENSE, *missing[start : start + _SERIES_AT_ONCE]], values, progress))


def measure(
    shape: tuple[int, int, int], patterns: Sequence[Pattern], tokens: Sequence[int], values: Values = "fp32"
) -> list[list[float]]:
    """Seconds of a product with each pattern (`Dense`: torch's), by token count; measured now, on this very shape."""
    batch, rows, cols = shape
    found = Bed(patterns, values).seconds(rows, cols, tokens, _SHAPE_SECONDS)
    return [[batch * one for one in taken] for taken in found]


def interpolate(points: Points, rows: int, cols: int, tokens: int) -> float:
    """Seconds between the grid's points; outside, the rate of the nearest. Never below the quickest call measured."""
    axes = (_weights(SIZES, rows), _weights(SIZES, cols), _weights(TOKENS, tokens))
    rate = sum(
        a * b * c * math.log(points[r, k, t] / (r * k * t)) for (r, a), (k, b), (t, c) in itertools.product(*axes)
    )
    return max(math.exp(rate) * rows * cols * tokens, min(points.values()))


def _weights(grid: tuple[int, ...], at: int) -> list[tuple[int, float]]:
    """The grid's values around `at`, with their shares by logarithm."""
    i = bisect_right(grid, at)
    if i in (0, len(grid)):
        return [(grid[min(i, len(grid) - 1)], 1.0)]
    low, high = grid[i - 1], grid[i]
    share = math.log(at / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


def _model(shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
    """The formula that stands in for a measurement: a call, then memory or arithmetic, whichever is slower."""
    sparse = library.level() is not None and no_kernel(pattern, values) is None
    kept = math.prod(shape) * (pattern.density if sparse else 1.0)
    few, many = 20e9, 27e9  # products a second of the row and the token kernel, on one core with AVX2 at 3 GHz or so
    bytes_each, products_per_second = (4.5, few if tokens < 13 else many) if sparse else (4.0, 37e9)
    return 5e-6 + max(kept * bytes_each / 10e9, kept * tokens / (products_per_second * torch.get_num_threads()))


def _name(pattern: Pattern, values: Values) -> str:
    return "dense" if no_kernel(pattern, values) else f"{values} {series_of(pattern, values)}"


def _measure(patterns: list[Pattern], values: Values, progress: Progress) -> dict[str, Points]:
    """The whole grid for several series, dense first; the better of two passes, for neighbours come and go."""
    bed = Bed(patterns, values)
    passes = [_pass(bed, f"measuring kernels ({number} of 2)", progress) for number in (1, 2)]
    found = [{at: min(a[at], b[at]) for at in a} for a, b in zip(*passes, strict=True)]
    return {_name(pattern, values): points for pattern, points in zip(patterns, found, strict=True)}


def _pass(bed: Bed, task: str, progress: Progress) -> list[Points]:
    shapes = sorted(itertools.product(SIZES, SIZES), key=math.prod)
    found: list[Points] = [{} for _ in bed.patterns]
    for done, (rows, cols) in enumerate(shapes):
        progress(task, done, len(shapes))
        counts = [tokens for tokens in TOKENS if rows * cols * tokens <= _MOST_WORK]
        for tokens, taken in zip(counts, bed.seconds(rows, cols, counts, _POINT_SECONDS), strict=True):
            for points, one in zip(found, taken, strict=True):
                points[rows, cols, tokens] = one
        for tokens, points in itertools.product(TOKENS[len(counts) :], found):
            longer = points[_WHOLE, _WHOLE, tokens] / points[_WHOLE, _WHOLE, counts[-1]]
            points[rows, cols, tokens] = points[rows, cols, counts[-1]] * longer
    return found


class Table:
    """The series known for one machine and thread count, and the file that keeps them (None: nowhere)."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.series: dict[str, Points] = _read(file) if file else {}

    def add(self, measured: dict[str, Points]) -> None:
        """Take in series that were measured beside a dense one; they keep their ratio to it."""
        dense = self.series.setdefault("dense", measured["dense"])
        for name, points in measured.items():
            if name != "dense":
                # The machine may be slower or faster now than when the first series were measured.
                self.series[name] = {at: one * dense[at] / measured["dense"][at] for at, one in points.items()}
        if self.file:
            _write(self.file, self.series)


def _table() -> Table:
    return _table_for(torch.get_num_threads())


@cache
def _table_for(threads: int) -> Table:
    return Table(cache_file(threads) if library.level() else None)


def cache_file(threads: int) -> Path:
    """Where the table of this machine is kept."""
    stands_for = [_FORMAT, *_processor(), library.level(), threads, _library_hash(), torch.__version__]
    key = hashlib.sha256(json.dumps(stands_for).encode()).hexdigest()[:16]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sparsec" / f"cost-{key}.json"


def _library_hash() -> str:
    return hashlib.sha256(Path(library.library()._name).read_bytes()).hexdigest()


def _processor() -> tuple[str, str]:
    """Model and features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine(), platform.processor()
    fields = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    return fields.get("model name", ""), fields.get("flags", "")


def _read(file: Path) -> dict[str, Points]:
    """The series of a file; none where there is no file, or it is not what `_write` writes."""
    try:
        data: dict[str, list[list[Any]]] = json.loads(file.read_text())["series"]
        series = {name: {(r, k, t): float(s) for r, k, t, s in rows} for name, rows in data.items()}
    except OSError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.info("%s is damaged and will be measured again (%s)", file, error)
        return {}
    grid = set(itertools.product(SIZES, SIZES, TOKENS))
    sound = all(grid == points.keys() and all(one > 0 for one in points.values()) for points in series.values())
    return series if sound else {}


def _write(file: Path, series: dict[str, Points]) -> None:
    """Replace the file in one step; a folder that cannot be written costs another measurement, nothing else."""
    data = {name: [[*at, one] for at, one in points.items()] for name, points in series.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as scratch:
            json.dump({"series": data}, scratch)
        os.replace(scratch.name, file)
    except OSError as error:
        log.info("%s cannot be written, so kernels are measured again next time (%s)", file, error)
