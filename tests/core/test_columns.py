"""The four ways to choose the columns of a block, where they differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparsec.columns import SOLVERS, Solver, choose

GREEDY_ALONE_FAILS = torch.tensor([[[1.0, 0.0, 0.0, 2.0, 4.0], [1.0, 3.0, 2.0, 0.0, 0.0]]])
"""Column 0 looks as good as 2 and 3 on the way, but is worth nothing once they are in."""
MANY_SMALL_OR_FEW_LARGE = torch.tensor(
    [[[1.0, 3.0, 4.0, 4.0, 4.0], [1.0, 0.0, 4.0, 4.0, 4.0], [2.0, 0.0, 4.0, 4.0, 4.0]]]
)
"""Column 0 has the larger sum, column 1 the larger sum of squares."""


def chosen(score: Tensor, solver: Solver) -> list[int]:
    return choose(score, solver)[0].tolist()


def test_greedy_corrects_itself_by_swaps() -> None:
    assert [1, 2, 3, 4] == chosen(GREEDY_ALONE_FAILS, "greedy") == chosen(GREEDY_ALONE_FAILS, "exact")


def test_l1_sums_scores_and_l2_their_squares() -> None:
    assert [0, 2, 3, 4] == chosen(MANY_SMALL_OR_FEW_LARGE, "l1")
    assert [1, 2, 3, 4] == chosen(MANY_SMALL_OR_FEW_LARGE, "l2")


@pytest.mark.parametrize("solver", SOLVERS)
def test_blocks_do_not_see_each_other(solver: Solver) -> None:
    score = torch.rand(30, 4, 7, generator=torch.Generator().manual_seed(0))

    assert torch.equal(choose(score, solver), torch.cat([choose(block[None], solver) for block in score]))


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_is_chosen_only_when_nothing_else_is_left(solver: Solver) -> None:
    score = torch.zeros(2, 3, 6)
    score[0, :, 3:] = -1.0  # three real columns
    score[1, :, 5:] = -1.0
    columns = choose(score, solver)

    assert [0, 1, 2] == columns[0, :3].tolist()
    assert [0, 1, 2, 3] == columns[1].tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_given_scores_are_not_changed(solver: Solver) -> None:
    score = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(1))
    before = score.clone()
    choose(score, solver)

    assert torch.equal(before, score)
