"""The share of a score that a pattern keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec.choosing.options import kept
from sparsec.choosing.scoring import retained, some_rows
from sparsec.pattern import Pattern

SAMPLED = 0.01  # 2^15 weights of whole blocks are looked at, no tails
PATTERNS = ["2:4", "2:8", "1:4", "16:2:5", "64:2:8", "128:2:32", "16:2:8@strip", "unstructured:0.7"]


def exact(pattern: Pattern, score: torch.Tensor) -> float:
    mask = pattern.mask(pattern.project(score), score.shape[2])
    return float(score[mask].sum(dtype=torch.float64) / score.sum(dtype=torch.float64))


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("shape", [(1, 7, 9), (1, 257, 40), (1, 384, 384), (3, 100, 130), (1, 1000, 500)])
def test_it_is_near_the_exact_share(text: str, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    score = torch.rand(shape, generator=generator) * torch.rand(shape[2], generator=generator)
    pattern = Pattern.parse(text)

    assert exact(pattern, score) == pytest.approx(retained(pattern, score), abs=SAMPLED)


def test_a_small_weight_is_looked_at_whole() -> None:
    score = torch.rand(1, 50, 40, generator=torch.Generator().manual_seed(0))

    assert exact(Pattern.parse("16:2:5"), score) == pytest.approx(retained(Pattern.parse("16:2:5"), score), rel=1e-6)


def test_a_score_of_nothing_but_zeros_keeps_no_share() -> None:
    assert 0 == retained(Pattern.parse("2:4"), torch.zeros(1, 8, 8))


def test_rows_are_taken_in_strips_from_all_over_a_large_weight() -> None:
    weight = torch.arange(1024.0)[None, :, None]
    taken = some_rows(weight, 256)

    assert [0, 127, 512, 639] == [int(taken[0, i, 0]) for i in (0, 127, 128, 255)]
    assert some_rows(weight[:, :200], 256).shape == (1, 200, 1)


@given(
    st.sampled_from([*PATTERNS, "4:8", "3:2:7", "16:2:5@strip"]),
    st.integers(1, 2),
    st.integers(1, 20),
    st.integers(1, 24),
)
def test_the_weights_kept_are_counted_with_all_tails(text: str, batch: int, rows: int, cols: int) -> None:
    pattern, score = Pattern.parse(text), torch.rand(batch, rows, cols, generator=torch.Generator().manual_seed(cols))

    assert int(pattern.mask(pattern.project(score), cols).sum()) == kept(pattern, (batch, rows, cols))


def test_dense_keeps_all() -> None:
    assert 24 == kept(None, (2, 3, 4))
