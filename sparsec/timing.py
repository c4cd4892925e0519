"""Ratios of run times, measured so that a noisy machine cannot choose the winner; and the inputs to measure with."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = (1, 32, 128, 512)
_DIMS = re.compile(r"\[(.*)\]")
_LEAST_TURNS, _MOST_TURNS = 3, 1000


@dataclass(frozen=True)
class Times:
    """Seconds of one call: of the calling thread's processor time, and of wall time."""

    cpu: float
    wall: float


def clock(threads: int) -> str:
    """The clock to compare by: a thread's processor time leaves out the machine's other work, but sees one thread."""
    return "thread CPU time" if threads == 1 else "wall time"


def judged(times: Mapping[str, Times], threads: int) -> dict[str, float]:
    """The seconds to compare by. See `clock`."""
    return {name: one.cpu if threads == 1 else one.wall for name, one in times.items()}


def interleaved(
    runs: Mapping[str, Callable[[], Any]], budget_seconds: float = 1.0, in_a_row: int = 1
) -> dict[str, Times]:
    """Times of each run: the fastest tenth of several, taken in turns, so that all meet the same disturbances.

    One turn to warm up, then turns of `in_a_row` timed calls each until `budget_seconds` are spent, 3 to 1000 of them.
    The very fastest is not taken where there are ten or more: the clock of a virtual machine skips now and then.
    """
    for run in runs.values():
        run()
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + budget_seconds
    for turn in range(_MOST_TURNS):
        if turn >= _LEAST_TURNS and time.perf_counter() > end:
            break
        for name, run in runs.items():
            for _ in range(in_a_row):
                start, start_cpu = time.perf_counter(), time.thread_time()
                run()
                cpu[name].append(time.thread_time() - start_cpu)
                wall[name].append(time.perf_counter() - start)
    return {name: Times(_fastest_tenth(cpu[name]), _fastest_tenth(wall[name])) for name in runs}


def _fastest_tenth(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 10]


def inputs_for_tokens(
    example: Mapping[str, Tensor], types: Mapping[str, str], dims: Mapping[str, Any], per_item: int, tokens: int
) -> tuple[dict[str, Tensor], int]:
    """Inputs in which the linear layers see about `tokens` rows, and how many they see.

    One sequence where the length is dynamic and long enough, else several; `per_item`: rows a batch item has where it
    is not dynamic. Values repeat those of the example.
    """
    length = tokens
    if "batch" not in dims:  # nothing can be resized
        return dict(example), per_item * next(iter(example.values())).shape[0]
    if "length" in dims:
        longest = dims["length"][1] or tokens
        length = min(tokens, longest)
        batch = math.ceil(tokens / length)
        actual = batch * length
    else:
        batch = max(1, round(tokens / per_item))
        actual = batch * per_item
    return _resized(example, types, dims, batch, length), actual


def inputs_for_size(
    example: Mapping[str, Tensor], types: Mapping[str, str], dims: Mapping[str, Any], batch: int, length: int
) -> dict[str, Tensor]:
    """Inputs of `batch` sequences of `length` tokens. Raises UsageError where the model does not take them."""
    for name, size in (("batch", batch), ("length", length)):
        if name not in dims:
            raise UsageError(f"{batch}x{length}: this model's {name} is fixed; give --tokens instead")
        low, high = dims[name]
        if size < low or (high is not None and size > high):
            raise UsageError(f"{batch}x{length}: this model takes a {name} of {low} to {high or 'any number'}")
    return _resized(example, types, dims, batch, length)


def _resized(
    example: Mapping[str, Tensor], types: Mapping[str, str], dims: Mapping[str, Any], batch: int, length: int
) -> dict[str, Tensor]:
    sizes = dict.fromkeys(dims, length) | {"batch": batch}
    return {name: _resize(value, types[name], sizes) for name, value in example.items()}


def _resize(value: Tensor, kind: str, sizes: Mapping[str, int]) -> Tensor:
    import torch

    match = _DIMS.search(kind)
    for axis, size in enumerate(match[1].split(", ") if match and match[1] else []):
        if size in sizes:
            value = value.index_select(axis, torch.arange(sizes[size]) % value.shape[axis])
    return value
