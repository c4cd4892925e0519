"""What other budgets would give, from the same table of options: the best choice at each, none better in both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparsec.choosing.knapsack import cheapest, cheapest_uniform
from sparsec.choosing.options import Chosen, Options, Weight, kept_of, lost, seconds_of, total

_POINTS = 8


@dataclass(frozen=True)
class Point:
    """One choice: seconds of the sites, weights that they keep, what is lost, how many different patterns it has."""

    seconds: float
    kept: float
    lost: float
    patterns: int


def front(options: Options, weight: Weight, uniform: bool, points: int = _POINTS) -> list[Point]:
    """Choices at budgets spread evenly between the lightest and dense, lightest first; a choice stands once."""
    lightest = sum(min(weight(one) for one in each) for each in options.values())
    dense = sum(weight(each[0]) for each in options.values())
    pick: Callable[[Options, float, Weight], Chosen | None] = cheapest_uniform if uniform else cheapest
    found: list[Point] = []
    for i in range(points):
        chosen = pick(options, lightest + (dense - lightest) * i / points, weight)
        if chosen is None:
            return []
        texts = {one.pattern for one in chosen.values() if one.pattern}
        point = Point(total(chosen, seconds_of), total(chosen, kept_of), lost(chosen), len(texts))
        if point not in found:
            found.append(point)
    return found
