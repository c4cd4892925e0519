"""Zeros of a pruned strip show its groups; where they do not, nothing is invented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random
from strategies import scores
from torch import Tensor

from sparsec.pattern import Strip
from sparsec.regroup import groups_of
from sparsec.strips import canonical


def pruned(pattern: Strip, rows: int, cols: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A projected score (rows, cols), and the columns it was projected to."""
    score = random(1, rows, cols, seed=seed).abs()
    selection = pattern.project(score)
    assert selection.columns is not None
    return torch.where(pattern.mask(selection, cols), score, 0.0)[0], selection.columns[0]


@pytest.mark.parametrize(
    ("v", "m", "rows", "cols"), [(64, 5, 128, 96), (64, 8, 90, 203), (32, 5, 64, 150), (16, 8, 48, 96)]
)
def test_projecting_a_pruned_weight_again_keeps_it_and_its_columns(v: int, m: int, rows: int, cols: int) -> None:
    pattern = Strip(v, 2, m)
    score, columns = pruned(pattern, rows, cols)
    again = pattern.project(score)

    assert again.columns is not None
    assert torch.equal(columns, again.columns[0])
    assert torch.equal(score > 0, pattern.mask(again, cols)[0])


def test_groups_are_found_whatever_the_values_and_the_order_of_columns() -> None:
    score, columns = pruned(Strip(32, 2, 8), 32, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    found = groups_of(score[:, order].pow(3), 8)

    assert found is not None
    assert torch.equal(columns[0].long(), canonical(order[found], 64))


def test_a_column_that_no_row_keeps_may_belong_to_a_group() -> None:
    score, _ = pruned(Strip(32, 2, 8), 32, 64)
    group = groups_of(score, 8)
    assert group is not None
    first, second, third, fourth = group[0].tolist()
    score[:, [first, second]], score[:, [third, fourth]] = 1.0, 0.0
    found = groups_of(score, 8)

    assert found is not None
    assert bool((score[:, found].gt(0).sum(2) == 2).all())


@pytest.mark.parametrize(
    "score",
    [torch.ones(40, 16), torch.zeros(40, 16), random(40, 16).clamp(min=0), torch.eye(40)[:, :16]],
    ids=["dense", "zeros", "half", "one a column"],
)
def test_zeros_that_form_no_groups_show_none(score: Tensor) -> None:
    assert groups_of(score, 2) is None


def test_rows_of_two_each_that_no_grouping_allows_show_none() -> None:
    """Every pair of 8 columns once: any four columns leave out a row, or hold two, never two of each four."""
    pairs = torch.combinations(torch.arange(8))
    score = torch.zeros(28, 8).scatter_(1, pairs, 1.0)

    assert groups_of(score, 1) is None


@given(groups=st.integers(1, 6), data=st.data())
def test_what_is_found_keeps_two_of_every_four(groups: int, data: st.DataObject) -> None:
    score = data.draw(scores((1, 5, 4 * groups)))[0]
    by_group = score.view(5, groups, 4)
    score = torch.zeros_like(by_group).scatter_(2, by_group.topk(2, dim=2).indices, 1.0).view(5, -1)
    found = groups_of(score[:, torch.randperm(4 * groups, generator=torch.Generator().manual_seed(0))], groups)

    if found is not None:
        assert sorted(found.flatten().tolist()) == list(range(4 * groups))
