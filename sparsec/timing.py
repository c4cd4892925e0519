"""Ratios of run times, measured so that a noisy machine cannot choose the winner."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = (1, 32, 128, 512)
_DIMS = re.compile(r"\[(.*)\]")


def interleaved(runs: Mapping[str, Callable[[], Any]], budget_seconds: float = 1.0, most: int = 50) -> dict[str, float]:
    """Seconds of each run: the least of several, taken in turns, so that all meet the same disturbances.

    Takes turns until `budget_seconds` are spent, at least 3 and at most `most` times, after one warm-up turn.
    """
    best = dict.fromkeys(runs, math.inf)
    for run in runs.values():
        run()
    end = time.perf_counter() + budget_seconds
    for turn in range(most):
        if turn >= 3 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


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
    sizes = dict.fromkeys(dims, length) | {"batch": batch}
    return {name: _resize(value, types[name], sizes) for name, value in example.items()}, actual


def _resize(value: Tensor, kind: str, sizes: Mapping[str, int]) -> Tensor:
    import torch

    match = _DIMS.search(kind)
    for axis, size in enumerate(match[1].split(", ") if match and match[1] else []):
        if size in sizes:
            value = value.index_select(axis, torch.arange(sizes[size]) % value.shape[axis])
    return value
