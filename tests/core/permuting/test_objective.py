"""A grid keeps what its pattern keeps, and its tables say what an exchange would give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.pattern import Pattern
from sparsec.permuting.objective import Grid, Grouped, grouped

PATTERNS = ("2:4", "1:4", "3:4", "2:8", "2:5", "3:2:4", "3:2:5", "2:2:8")
SUMS = 1e-5  # float32 sums of up to 100 scores below 1 against float64


def pattern_of(text: str) -> Grouped:
    found = grouped(Pattern.parse(text))
    assert found is not None
    return found


@st.composite
def cases(draw: st.DrawFn, patterns: tuple[str, ...] = PATTERNS) -> tuple[Grouped, Tensor]:
    shape = draw(st.tuples(st.integers(1, 7), st.integers(4, 17)))
    score = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return pattern_of(draw(st.sampled_from(patterns))), score


def kept(pattern: Grouped, score: Tensor) -> float:
    return float((score[None] * pattern.choose(score)[1]).sum(dtype=torch.float64))


@given(cases())
def test_a_grid_keeps_what_the_pattern_selects(case: tuple[Grouped, Tensor]) -> None:
    pattern, score = case

    assert pytest.approx(kept(pattern, score), rel=SUMS) == Grid.of(score, pattern).total


@given(cases(), st.sampled_from(["rows", "cols"]), st.integers(0, 99))
def test_moving_gives_the_grid_of_the_permuted_matrix(case: tuple[Grouped, Tensor], side: str, seed: int) -> None:
    pattern, score = case
    order = torch.randperm(score.shape[side == "cols"], generator=torch.Generator().manual_seed(seed))
    grid = Grid.of(score, pattern)

    grid.move(side, torch.arange(len(order)), order)

    expected = Grid.of(score[order] if side == "rows" else score[:, order], pattern)
    assert torch.equal(expected.cells, grid.cells)
    assert torch.allclose(expected.worth, grid.worth, rtol=SUMS)


@given(cases())
def test_the_table_of_columns_is_what_comes_true(case: tuple[Grouped, Tensor]) -> None:
    pattern, score = case
    grid = Grid.of(score, pattern)
    places = torch.arange(0, score.shape[1], pattern.m)

    table = grid.placed("cols", places)

    for i, place in enumerate(places.tolist()):
        for j, source in enumerate(places.tolist()):
            replaced = score.clone()
            replaced[:, place] = score[:, source]
            exact = float(Grid.of(replaced, pattern).worth[:, place // pattern.m].sum())
            assert table[i, j] <= exact * (1 + SUMS)
            if pattern.m <= 5:
                assert pytest.approx(exact, rel=SUMS) == float(table[i, j])


@given(cases(("3:2:4", "3:2:5", "2:2:8")), st.integers(0, 99))
def test_an_assignment_of_rows_gains_at_least_what_its_table_promises(case: tuple[Grouped, Tensor], seed: int) -> None:
    pattern, score = case
    grid, places = Grid.of(score, pattern), torch.arange(len(score))
    order = torch.randperm(len(score), generator=torch.Generator().manual_seed(seed))
    table, before = grid.placed("rows", places), grid.total
    promised = float(table[places, order].sum() - table.trace())

    assert pytest.approx(before, rel=SUMS) == float(table.trace())
    grid.move("rows", places, order)
    assert grid.total >= before + promised - SUMS * before


@pytest.mark.parametrize(
    ("text", "found"),
    [("2:4", "2:4"), ("64:2:5+2:4", "64:2:5"), ("unstructured:0.5", "None"), ("4:4", "None"), ("64:2:5@strip", "None")],
)
def test_only_patterns_of_groups_of_columns_gain_by_order(text: str, found: str) -> None:
    assert found == str(grouped(Pattern.parse(text)))
