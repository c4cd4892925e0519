"""What a site may become, what a choice for all sites costs and loses, and how budgets and losses are said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from sparsec.intersection import Intersection
from sparsec.pattern import NM, Pattern, SharedColumns, Strip, Unstructured

Budget = Literal["speedup", "latency", "density"]
"""Times faster than dense; milliseconds of a run; share of the sites' weights that is kept."""
BUDGETS: tuple[Budget, ...] = get_args(Budget)
Objective = Literal["retained", "reconstruction", "sensitivity"]
"""What is to be lost least: summed magnitude; layers' outputs on calibration data; the first-order loss (gradients)."""
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
CALIBRATED = ("reconstruction", "sensitivity")
"""The objectives that look at calibration data."""


@dataclass(frozen=True)
class Option:
    """What a site may become: a pattern, or None for dense, with its seconds in a run and what is lost of the score.

    `lost`: the losses of sites add up; dense loses 0. `kept`: weights kept.
    """

    pattern: str | None
    seconds: float
    lost: float
    kept: float = 0.0


Options = Mapping[str, list[Option]]
"""By site; the first is dense, or the only one where the site's pattern was set before."""
Chosen = dict[str, Option]
Weight = Callable[[Option], float]
"""What an option takes of a budget."""


def seconds_of(option: Option) -> float:
    """The weight of a budget of time."""
    return option.seconds


def kept_of(option: Option) -> float:
    """The weight of a budget of density."""
    return option.kept


def total(chosen: Mapping[str, Option], weight: Weight) -> float:
    """What a choice takes of a budget."""
    return sum(weight(one) for one in chosen.values())


def lost(chosen: Mapping[str, Option]) -> float:
    """What a choice loses."""
    return sum(one.lost for one in chosen.values())


@dataclass(frozen=True)
class Figure:
    """How a loss is told: a key for data, words, and the number from a choice's loss."""

    key: str
    words: str
    of: Callable[[float], float]


FIGURES: dict[Objective, Figure] = {
    "retained": Figure("retained", "retained score", lambda lost: math.exp(-lost)),
    "reconstruction": Figure(
        "error", "relative output error of a layer (root mean square)", lambda lost: math.sqrt(max(lost, 0.0))
    ),
    "sensitivity": Figure("retained_sensitivity", "share of the gradient score kept", lambda lost: 1 - lost),
}


def kept(pattern: Pattern | None, shape: tuple[int, int, int]) -> int:
    """How many weights of a (batch, rows, cols) site a pattern keeps, tails included; None: all."""
    batch, rows, cols = shape
    if isinstance(pattern, Intersection):
        return min(kept(pattern.first, shape), kept(pattern.second, shape))  # the most: less is known when it is pruned
    if isinstance(pattern, Strip):
        per_row = pattern.n * (pattern.groups(cols) - 1) + min(pattern.n, pattern.real_slots(cols))
        return batch * rows * per_row
    if isinstance(pattern, (NM, SharedColumns)):
        return batch * rows * (cols // pattern.m * pattern.n + min(pattern.n, cols % pattern.m))
    if isinstance(pattern, Unstructured):
        return batch * pattern.kept(rows, cols)
    return round(batch * rows * cols * (pattern.density if pattern else 1))
