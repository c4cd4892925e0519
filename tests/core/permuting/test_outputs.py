"""Rows that want the same columns come to share a strip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.pattern import Pattern, Strip
from sparsec.permuting.outputs import assign_rows
from sparsec.strips import strip_columns

SUMS = 1e-5


def strip(text: str) -> Strip:
    found = Pattern.parse(text)
    assert isinstance(found, Strip)
    return found


def kept(score: Tensor, pattern: Strip, rows: Tensor) -> float:
    columns = strip_columns(score[rows], pattern.v, pattern.m, rounds=1)
    selection = pattern.select(score[None], columns[None], rows[None])
    return float((score * pattern.mask(selection, score.shape[1])).sum())


@settings(max_examples=15)
@given(st.integers(1, 13), st.integers(4, 19), st.sampled_from(["2:2:5@strip", "3:2:8@strip"]), st.integers(0, 99))
def test_rows_are_permuted_ascending_in_strips_and_keep_no_less(rows: int, cols: int, text: str, seed: int) -> None:
    score, pattern = torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)), strip(text)

    order = assign_rows(score, pattern)

    assert torch.equal(order.sort().values, torch.arange(rows))
    assert all(bool((part.diff() > 0).all()) for part in order.split(pattern.v))
    assert kept(score, pattern, order) >= kept(score, pattern, torch.arange(rows)) * (1 - SUMS)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_want_the_same_columns_meet(seed: int) -> None:
    """Four kinds of rows in four strips: a strip has room for the columns of two of them, and kinds come mixed."""
    generator, pattern = torch.Generator().manual_seed(seed), strip("4:2:8@strip")
    kind = torch.randperm(16, generator=generator) % 4
    score = 0.01 * torch.rand(16, 32, generator=generator)
    for one in range(4):
        score[kind == one, 8 * one : 8 * one + 8] += 1

    order = assign_rows(score, pattern)

    mixed, found = (kept(score, pattern, rows) for rows in (torch.arange(16), order))
    assert mixed < 115 < found


def test_one_strip_is_left_as_it_is() -> None:
    assert [0, 1, 2] == assign_rows(torch.rand(3, 8), strip("16:2:4@strip")).tolist()
