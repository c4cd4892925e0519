"""Every set of a group is tried: against least squares by brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from core.oneshot.problems import gram, least_squares, loss, weight
from hypothesis import given
from hypothesis import strategies as st

from sparsec.oneshot.groups import best_values, choose_pair_sets, pairs_in_quads, sets_of

ROUNDING = {"rtol": 1e-3, "atol": 1e-4}  # fp32 solves of well damped systems against fp64
SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.integers(1, 8), st.integers(1, 8))
def test_best_values_are_least_squares_on_every_set(seed: int, m: int, kept: int) -> None:
    hessian, y = gram(m, seed), weight(1, m, seed)
    sets = sets_of(m, kept)
    assert sets is not None
    found = best_values(hessian[None], sets)[0] @ y[0]

    for q, chosen in zip(found, sets, strict=True):
        mask = torch.zeros(1, m, dtype=torch.bool).index_fill(1, chosen, True)
        expected = least_squares(y, hessian, mask)
        assert not q[~mask[0]].any()
        torch.testing.assert_close(q.double(), expected[0], **ROUNDING)
        gain = float(q.double() @ hessian.double() @ y[0].double())
        lost = loss(y, torch.zeros_like(y), hessian) - loss(y, expected.float(), hessian)
        assert pytest.approx(lost, rel=1e-3, abs=1e-4 * loss(y, torch.zeros_like(y), hessian)) == gain


@given(SEEDS, st.integers(5, 9), st.integers(1, 12), st.integers(1, 5))
def test_shared_pairs_are_the_best_of_all_quads(seed: int, m: int, rows: int, height: int) -> None:
    sets = sets_of(m, 2)
    assert sets is not None
    gain = weight(len(sets), rows, seed).abs()
    found = sets[choose_pair_sets(gain, m, height)]

    number = {tuple(pair): i for i, pair in enumerate(sets.tolist())}
    for start in range(0, rows, height):
        strip = range(start, min(start + height, rows))
        totals = {
            quad: sum(max(float(gain[number[pair], row]) for pair in combinations(quad, 2)) for row in strip)
            for quad in combinations(range(m), 4)
        }
        chosen = {column for row in strip for column in found[row].tolist()}
        assert len(chosen) <= 4
        kept = sum(float(gain[number[tuple(found[row].tolist())], row]) for row in strip)
        assert pytest.approx(max(totals.values()), rel=1e-5) == kept


def test_too_many_sets_are_not_tried() -> None:
    assert sets_of(20, 10) is None
    assert sets_of(16, 8) is None
    assert pairs_in_quads(20) is None
    assert sets_of(3, 5) is not None and [[0, 1, 2]] == sets_of(3, 5).tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("m", range(4, 30))
def test_wherever_pairs_are_tried_their_quads_are_known(m: int) -> None:
    assert (sets_of(m, 2) is None) == (pairs_in_quads(m) is None)
