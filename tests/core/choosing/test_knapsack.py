"""The choice under a budget is the best there is."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.choosing import knapsack
from sparsec.choosing.front import front
from sparsec.choosing.knapsack import cheapest, cheapest_uniform
from sparsec.choosing.options import Option, kept_of, lost, seconds_of, total

ROUNDING = 1e-9  # of sums in another order


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Option]]:
    """Sites with options, some of which have one only; dense loses nothing and is heaviest."""
    number = st.one_of(st.integers(1, 4).map(float), st.floats(0.01, 4))
    table = {}
    for site in range(draw(st.integers(1, 5))):
        names = draw(st.sampled_from([(), ("a",), ("a", "b"), ("a", "b", "c")]))
        options = [Option(text, draw(number), draw(number)) for text in names]
        table[str(site)] = [Option(None, 4.5, 0.0), *options]
    return table


def best(table: dict[str, list[Option]], room: float) -> float:
    """The least loss of all choices that fit, by trying them all."""
    choices = [dict(zip(table, each, strict=True)) for each in itertools.product(*table.values())]
    return min(lost(one) for one in choices if total(one, seconds_of) <= room * (1 + ROUNDING))


@given(tables(), st.floats(0, 1))
def test_it_equals_brute_force_at_every_budget(table: dict, share: float) -> None:
    lightest = sum(min(one.seconds for one in each) for each in table.values())
    dense = sum(each[0].seconds for each in table.values())
    room = lightest + share * (dense - lightest)
    found = cheapest(table, room, seconds_of)

    assert list(table) == list(found)
    assert total(found, seconds_of) <= room * (1 + ROUNDING)
    assert lost(found) == pytest.approx(best(table, room), abs=ROUNDING)


def test_a_price_alone_would_waste_room_that_is_used_here() -> None:
    table = {name: [Option(None, 10, 0), Option("a", 6, 1.0), Option("b", 0, 1.6)] for name in "xy"}

    # One dense, one b: no price gives two like sites two options.
    assert {None, "b"} == {one.pattern for one in cheapest(table, 10, seconds_of).values()}


def test_too_small_a_budget_gives_the_lightest() -> None:
    table = {"x": [Option(None, 3, 0), Option("a", 1, 5), Option("b", 2, 1)]}

    assert {"x": Option("a", 1, 5)} == cheapest(table, 0.5, seconds_of)


def test_more_states_than_are_kept_cost_the_optimum_but_not_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        str(i): [
            Option(None, 5.0 + i, 0),
            *(Option(str(j), 5.0 / j + i * j / 7, math.sin(i * j) + 2) for j in range(1, 6)),
        ]
        for i in range(1, 7)
    }
    exact = lost(cheapest(table, 20, seconds_of))
    monkeypatch.setattr(knapsack, "_MOST_STATES", 1)
    found = cheapest(table, 20, seconds_of)

    assert total(found, seconds_of) <= 20
    assert lost(found) >= exact == pytest.approx(best(table, 20))


def test_one_pattern_for_all_leaves_sites_without_options_alone() -> None:
    a, b = Option("a", 2, 1), Option("b", 1, 3)
    table = {"x": [Option(None, 3, 0), a, b], "fixed": [Option("c", 1, 0)], "y": [Option(None, 3, 0), a, b]}

    assert ["a", "c", "a"] == [one.pattern for one in (cheapest_uniform(table, 5, seconds_of) or {}).values()]
    assert ["b", "c", "b"] == [one.pattern for one in (cheapest_uniform(table, 1, seconds_of) or {}).values()]


def test_one_pattern_for_all_that_not_all_can_have_is_none() -> None:
    table = {"x": [Option("a", 1, 1), Option("b", 2, 0)], "y": [Option("c", 1, 1), Option("d", 2, 0)]}

    assert cheapest_uniform(table, 9, seconds_of) is None


@given(tables())
def test_of_the_front_no_point_is_better_than_another_in_both(table: dict) -> None:
    for weight in (seconds_of, kept_of):
        points = front(table, weight, uniform=False)
        for one, other in itertools.permutations(points, 2):
            assert not (
                weight_of(one, weight) < weight_of(other, weight) - ROUNDING and one.lost < other.lost - ROUNDING
            )


def weight_of(point: object, weight: object) -> float:
    return point.seconds if weight is seconds_of else point.kept  # type: ignore[attr-defined]
