"""The rule of "Beyond 2:4" (arXiv 2410.16135): for each V the smallest M that is fast enough, then the V of most masks.

The number K of masks of one block of V x M weights, per weight: ln K = (ln C(M, 4) + V ln 6) / (V M), for one choice of
4 columns and 6 pairs in each row. `printed` is a formula that a second-hand note prints, with C(M, 4)^4: it counts the
column choice four times, and ranks differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

Diversity = Literal["counted", "printed"]
HEIGHTS = (16, 32, 64, 128)
LEAST_M, MOST_M = 4, 64


def diversity(v: int, m: int, formula: Diversity = "counted") -> float:
    """ln K of V:2:M.

    >>> [round(diversity(*vm), 4) for vm in ((64, 4), (64, 5), (16, 6), (64, 8))]
    [0.4479, 0.3634, 0.3268, 0.2323]
    """
    choices = {"counted": 1, "printed": 4}[formula]
    return (choices * math.log(math.comb(m, 4)) + v * math.log(6)) / (v * m)


def smallest_m(fits: Callable[[int], bool], most: int = MOST_M) -> int | None:
    """Phase 1 for one V: the least M that fits, where a larger M always fits too; None where none does.

    M is doubled until it fits, then bisected: small M are asked about first, since large ones cost a measurement each.
    """
    low = high = LEAST_M
    while not fits(high):
        if high == most:
            return None
        low, high = high + 1, min(2 * high, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def most_diverse(found: Sequence[tuple[int, int]], formula: Diversity) -> tuple[int, int]:
    """Phase 2: of several (V, M) the one of largest ln K; ties go to the first."""
    return max(found, key=lambda vm: diversity(vm[0], vm[1], formula))
