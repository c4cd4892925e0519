"""What is promised on one H200, in bf16: times faster than torch's dense product, what must be and what is aimed at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, Literal

Regime = Literal["decode", "prefill", "encoder"]
PATTERNS = ("2:4", "64:2:5", "64:2:8", "128:2:8", "64:2:16")


@dataclass(frozen=True)
class Goal:
    """A ratio, the geometric mean over all its cases: that of the faster of what the product could run."""

    regime: Regime
    pattern: str
    must: float
    stretch: float
    may_run_dense: bool = False
    """Whether the dense product counts too: where nothing sparse is faster, layers run dense."""


GOALS = (
    *(
        Goal("decode", pattern, must, stretch)
        for pattern, must, stretch in zip(PATTERNS, (1.2, 1.5, 2.0, 2.0, 3.0), (1.5, 2.0, 3.0, 3.0, 5.0), strict=True)
    ),
    *(
        Goal("prefill", pattern, must, stretch, may_run_dense=pattern == "64:2:5")
        for pattern, must, stretch in zip(PATTERNS, (1.1, 1.0, 1.1, 1.3, 1.5), (1.5, 1.15, 1.67, 2.1, 2.5), strict=True)
    ),
    Goal("encoder", "64:2:8", 1.16, 1.5),  # published of an RTX 3090
    Goal("encoder", "128:2:8", 1.25, 1.8),
)


@dataclass(frozen=True)
class Judged:
    """A goal and what was measured; None where a case of it was not."""

    goal: Goal
    ratio: float | None

    @property
    def met(self) -> bool:
        return self.ratio is not None and self.ratio >= self.goal.must

    @property
    def stretched(self) -> bool:
        return self.ratio is not None and self.ratio >= self.goal.stretch


def judge(rows: Sequence[Mapping[str, Any]], expected: Mapping[tuple[Regime, str], int]) -> list[Judged]:
    """All goals. `expected`: how many cases each needs; rows: of all cases that ran, see `layers` and `encoders`."""
    found = []
    for goal in GOALS:
        cases = [row for row in rows if (row["regime"], row["pattern"]) == (goal.regime, goal.pattern)]
        complete = len(cases) == expected[goal.regime, goal.pattern] and all(row["correct"] for row in cases)
        ratios = [max(ratio(row), 1.0 if goal.may_run_dense else 0.0) for row in cases]
        found.append(Judged(goal, geometric_mean(ratios) if complete and cases else None))
    return found


def ratio(row: Mapping[str, Any]) -> float:
    """Times faster than dense: the fastest of what ran sparse, by the slower of its two medians."""
    return float(min(row["seconds"]["dense"]) / min(max(two) for name, two in row["seconds"].items() if name in SPARSE))


SPARSE = ("panels", "panels, side by side", "cuSPARSELt", "cuSPARSELt, searched")
