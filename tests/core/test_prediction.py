"""Amdahl's law with numbers small enough to follow by hand."""

from __future__ import annotations

import dataclasses

import pytest

from sparsec.cost import DENSE
from sparsec.pattern import NM, Pattern
from sparsec.prediction import Survey, predict
from sparsec.profiling import NodeTime, Profile
from sparsec.sites import Site
from sparsec.view import WeightView

SPARSE = NM(2, 4)
# Whole 10 s, 4 of them rest; the three calls left out took 1 + 2 + 1 when timed alone, so they stand for 1.5 s each.
NODES = {
    "a": NodeTime("linear", 1.0, 7),
    "gelu": NodeTime("gelu", 1.0, 7),
    "b": NodeTime("linear", 2.0, 5),
    "norm": NodeTime("layer_norm", 4.0, 7),
}
PROFILE = Profile(7, 10.0, 4.0, NODES)


def site(name: str, user: str) -> Site:
    return Site(name, WeightView((0, 1), (8, 8)), (user,), "linear")


def seconds(site: Site, pattern: Pattern, rows: int) -> float:
    """The table: dense products at half of their pace in the model, sparse ones four times as fast."""
    alone = {"A": 0.75, "B": 1.5}[site.name]
    assert {"A": 7, "B": 5}[site.name] == rows
    return alone if pattern == DENSE else alone / 4


SURVEY = Survey((PROFILE,), (site("A", "a"), site("B", "b")), {"gelu": "A"})


def test_only_sparse_sites_and_what_they_absorb_get_faster() -> None:
    both = predict(SURVEY, PROFILE, {"A": SPARSE, "B": SPARSE}, seconds)

    assert (10.0, 4.0) == (both.dense, pytest.approx(both.rest))
    assert [("A", 7, 3.0), ("B", 5, 3.0)] == [(one.site, one.rows, one.dense) for one in both.layers]
    assert [0.375, 0.75] == [pytest.approx(one.sparse) for one in both.layers]  # 1.5 / 4 without gelu, 3 / 4
    assert 10 / 5.125 == pytest.approx(both.speed)
    assert 10 / 4 == pytest.approx(both.limit)


def test_a_site_that_stays_dense_keeps_its_time_and_its_activation() -> None:
    one = predict(SURVEY, PROFILE, {"B": SPARSE}, seconds)

    assert 7.0 == pytest.approx(one.rest)
    assert 10 / 7.75 == pytest.approx(one.speed)


def test_nothing_sparse_changes_nothing() -> None:
    assert 1.0 == predict(SURVEY, PROFILE, {}, seconds).speed


def test_sites_that_noise_hides_are_taken_call_by_call() -> None:
    hidden = dataclasses.replace(PROFILE, rest=PROFILE.seconds)

    assert 1.0 < predict(SURVEY, hidden, {"A": SPARSE, "B": SPARSE}, seconds).speed
