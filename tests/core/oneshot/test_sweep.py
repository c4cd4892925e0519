"""SparseGPT's sweep: the pattern holds at every tail, and the answer is that of the formula whatever the blocks are."""

from __future__ import annotations

import pytest
import torch
from core.oneshot.problems import gram, loss, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import nm_patterns, strip_patterns, vnm_patterns
from torch import Tensor

from sparsec.oneshot import sweep as module
from sparsec.oneshot.groups import sets_of
from sparsec.oneshot.selecting import selection_of
from sparsec.oneshot.sweep import sweep, sweep_strips, upper_factor
from sparsec.pattern import NM, VNM, Pattern
from sparsec.strips import strip_columns
from sparsec.vnm import Strip

SEEDS, ROWS, COLS = st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 45)
FP32 = 1e-3  # of the objective: fp32 Cholesky factors of Gram matrices of at most 300 columns


def check(pattern: Pattern, kept: Tensor, mask: Tensor, columns: Tensor | None = None) -> None:
    """The mask keeps as many as the pattern allows, its selection is that of the mask, and nothing else is kept."""
    selection = selection_of(pattern, mask, columns)

    assert torch.equal(mask, pattern.mask(selection, mask.shape[1])[0])
    assert 0 == pattern.violations_of(mask[None].float(), selection).count
    assert not kept[~mask].any()
    assert torch.isfinite(kept).all()


@given(nm_patterns(), ROWS, COLS, SEEDS)
def test_every_group_keeps_n_whatever_the_tail(pattern: NM, rows: int, cols: int, seed: int) -> None:
    kept, mask = sweep(weight(rows, cols, seed), gram(cols, seed), pattern)

    check(pattern, kept, mask)
    counts = [
        min(pattern.n, cols - start) if cols - start < pattern.m else pattern.n for start in range(0, cols, pattern.m)
    ]
    assert [sum(counts)] * rows == mask.sum(1).tolist()


@given(vnm_patterns(), ROWS, COLS, SEEDS)
def test_every_block_keeps_four_columns_whatever_the_tails(pattern: VNM, rows: int, cols: int, seed: int) -> None:
    kept, mask = sweep(weight(rows, cols, seed), gram(cols, seed), pattern)

    check(pattern, kept, mask)


@pytest.mark.parametrize("text", ["8:16", "4:12", "10:20", "1:200", "3:2:17", "3:2:24", "64:2:5", "128:2:256"])
@pytest.mark.parametrize("cols", [37, 300])
def test_large_groups_are_ranked_and_keep_the_pattern(text: str, cols: int) -> None:
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, VNM))
    kept, mask = sweep(weight(7, cols), gram(cols), pattern)

    check(pattern, kept, mask)


@given(strip_patterns(), ROWS, COLS, SEEDS)
def test_strips_keep_two_of_each_four_of_their_columns(pattern: Strip, rows: int, cols: int, seed: int) -> None:
    dense, hessian = weight(rows, cols, seed), gram(cols, seed)
    columns = strip_columns(dense.abs(), pattern.v, pattern.m)
    kept, mask = sweep_strips(dense, hessian, pattern, columns)

    check(pattern, kept, mask, columns)


@given(st.one_of(nm_patterns(9), vnm_patterns(5, 9)), ROWS, COLS, SEEDS)
def test_independent_inputs_are_kept_by_weighted_magnitude(pattern: NM | VNM, rows: int, cols: int, seed: int) -> None:
    """With a diagonal Hessian nothing can be made up for: the largest w^2 h stay, as they are."""
    dense, sizes = weight(rows, cols, seed), weight(1, cols, seed + 1)[0].exp()
    kept, mask = sweep(dense, sizes.diag(), pattern)
    score = dense.square() * sizes
    selection = pattern.project(score, "exact")
    expected = pattern.mask(selection, cols)[0]

    torch.testing.assert_close(kept, dense.where(mask, 0.0), rtol=1e-4, atol=1e-5)
    if isinstance(pattern, NM):
        assert torch.equal(expected, mask)
    assert pytest.approx(float(score[expected].sum()), rel=1e-5) == float(score[mask].sum())


@pytest.mark.parametrize("text", ["2:4", "2:5", "3:7", "64:2:5", "4:2:8", "8:16", "5:2:17"])
@pytest.mark.parametrize("cols", [60, 61, 63, 300])
def test_the_size_of_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch, text: str, cols: int) -> None:
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, VNM))
    dense, hessian = weight(6, cols), gram(cols)
    found = []
    for block in (1, 128, 10_000):
        monkeypatch.setattr(module, "_BLOCK", block)
        found.append(sweep(dense, hessian, pattern))

    assert all(torch.equal(found[0][1], mask) for _, mask in found)
    for kept, _ in found:
        torch.testing.assert_close(found[0][0], kept, rtol=1e-3, atol=1e-4)


@given(st.integers(1, 8), st.integers(1, 40), SEEDS)
def test_the_cost_is_the_sum_over_groups_that_the_factor_gives(rows: int, cols: int, seed: int) -> None:
    hessian = gram(cols, seed)
    factor = upper_factor(hessian)

    assert not factor.tril(-1).any()
    torch.testing.assert_close(factor @ factor.T, hessian, rtol=1e-3, atol=1e-4 * float(hessian.max()))


@given(st.integers(2, 6), st.integers(1, 5), SEEDS)
@settings(max_examples=30)
def test_one_group_is_solved_exactly(m: int, rows: int, seed: int) -> None:
    """With a single group, greedy is no guess: the best of all sets with its best values."""
    from core.oneshot.problems import least_squares

    dense, hessian = weight(rows, m, seed), gram(m, seed)
    kept, _ = sweep(dense, hessian, NM(1 + m // 3, m))
    sets = sets_of(m, 1 + m // 3)
    assert sets is not None
    for row in range(rows):
        one = dense[row : row + 1]
        masks = [torch.zeros(1, m, dtype=torch.bool).index_fill(1, chosen, True) for chosen in sets]
        best = min(loss(one, least_squares(one, hessian, mask).float(), hessian) for mask in masks)
        assert pytest.approx(best, rel=FP32, abs=FP32 * loss(one, torch.zeros_like(one), hessian)) == loss(
            one, kept[row : row + 1], hessian
        )
