"""SparseGPT's sweep: the pattern holds at every tail, and the answer is that of the formula whatever the blocks are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.oneshot.problems import gram, loss, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import nm_patterns, strip_patterns, vnm_patterns
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.oneshot import native
from sparsec.oneshot import sweep as module
from sparsec.oneshot.groups import sets_of
from sparsec.oneshot.selecting import selection_of
from sparsec.oneshot.sweep import sweep, sweep_strips, upper_factor_
from sparsec.pattern import NM, VNM, Pattern
from sparsec.strips import strip_columns
from sparsec.vnm import Strip

SEEDS, ROWS, COLS = st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 45)
FP32 = 1e-3  # of the objective: fp32 Cholesky factors of Gram matrices of at most 300 columns


def check(pattern: Pattern, kept: Tensor, columns: Tensor | None = None) -> Tensor:
    """What is kept is finite, in the pattern, and as much as it allows; gives its mask."""
    selection, mask = selection_of(pattern, kept, columns)

    assert torch.isfinite(kept).all()
    assert torch.equal(mask, pattern.mask(selection, mask.shape[1])[0])
    assert 0 == pattern.violations_of(kept[None], selection).count
    assert torch.equal(mask, kept != 0)  # random weights are nowhere best at exactly 0
    return mask


@given(nm_patterns(), ROWS, COLS, SEEDS)
def test_every_group_keeps_n_whatever_the_tail(pattern: NM, rows: int, cols: int, seed: int) -> None:
    mask = check(pattern, sweep([weight(rows, cols, seed)], gram(cols, seed), 0.0, pattern))

    counts = [
        min(pattern.n, cols - start) if cols - start < pattern.m else pattern.n for start in range(0, cols, pattern.m)
    ]
    assert [sum(counts)] * rows == mask.sum(1).tolist()


@pytest.mark.parametrize("factored", [3, 4, 100])
def test_the_gram_matrix_is_used_as_memory_and_given_back(monkeypatch: pytest.MonkeyPatch, factored: int) -> None:
    monkeypatch.setattr(module, "_FACTORED", factored)
    hessian = gram(13, 0)
    hessian = hessian.tril() + hessian.tril(-1).T
    before = hessian.clone()
    sweep([weight(5, 13, 0)], hessian, 0.01, NM(2, 4))
    assert torch.equal(before, hessian)

    with pytest.raises(torch.linalg.LinAlgError):
        sweep([weight(5, 13, 0)], hessian, -2 * float(hessian.diagonal().max()), NM(2, 4))
    assert torch.equal(before, hessian)


@given(vnm_patterns(), ROWS, COLS, SEEDS)
def test_every_block_keeps_four_columns_whatever_the_tails(pattern: VNM, rows: int, cols: int, seed: int) -> None:
    check(pattern, sweep([weight(rows, cols, seed)], gram(cols, seed), 0.0, pattern))


@pytest.mark.parametrize("text", ["8:16", "4:12", "10:20", "1:200", "3:2:17", "3:2:24", "64:2:5", "128:2:256"])
@pytest.mark.parametrize("cols", [37, 300])
def test_large_groups_are_ranked_and_keep_the_pattern(text: str, cols: int) -> None:
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, VNM))

    check(pattern, sweep([weight(7, cols)], gram(cols), 0.0, pattern))


@given(strip_patterns(), ROWS, COLS, SEEDS)
def test_strips_keep_two_of_each_four_of_their_columns(pattern: Strip, rows: int, cols: int, seed: int) -> None:
    dense, hessian = weight(rows, cols, seed), gram(cols, seed)
    columns = strip_columns(dense.abs(), pattern.v, pattern.m)

    check(pattern, sweep_strips(dense, hessian, pattern, columns), columns)


@given(strip_patterns(), ROWS, COLS, SEEDS)
def test_strips_of_independent_inputs_keep_the_largest_two_of_each_four(
    pattern: Strip, rows: int, cols: int, seed: int
) -> None:
    dense, sizes = weight(rows, cols, seed), weight(1, cols, seed + 1)[0].exp()
    columns = strip_columns(dense.abs(), pattern.v, pattern.m)
    kept = sweep_strips(dense, sizes.diag(), pattern, columns)
    expected = pattern.mask(pattern.select((dense.square() * sizes)[None], columns[None]), cols)[0]

    torch.testing.assert_close(dense.where(expected, 0.0), kept, rtol=1e-4, atol=1e-5)


@given(st.one_of(nm_patterns(9), vnm_patterns(5, 9)), ROWS, COLS, SEEDS)
def test_independent_inputs_are_kept_by_weighted_magnitude(pattern: NM | VNM, rows: int, cols: int, seed: int) -> None:
    """With a diagonal Hessian nothing can be made up for: the largest w^2 h stay, as they are."""
    dense, sizes = weight(rows, cols, seed), weight(1, cols, seed + 1)[0].exp()
    kept = sweep([dense], sizes.diag(), 0.0, pattern)
    mask = check(pattern, kept)
    score = dense.square() * sizes
    selection = pattern.project(score, "exact")
    expected = pattern.mask(selection, cols)[0]

    torch.testing.assert_close(kept, dense.where(mask, 0.0), rtol=1e-4, atol=1e-5)
    if isinstance(pattern, NM):
        assert torch.equal(expected, mask)
    assert pytest.approx(float(score[expected].sum()), rel=1e-5) == float(score[mask].sum())


@pytest.mark.parametrize("text", ["2:4", "2:5", "3:7", "64:2:5", "4:2:8", "8:16", "8:20", "5:2:17"])
@pytest.mark.parametrize("cols", [60, 61, 63, 300])
@pytest.mark.parametrize(("name", "sizes"), [("_BLOCK", (1, 128, 10_000)), ("_FACTORED", (10_000, 256, 37, 1))])
def test_the_size_of_blocks_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, text: str, cols: int, name: str, sizes: tuple[int, ...]
) -> None:
    """Also where a group lies across two blocks of the factor, whose lower triangle is not zero there."""
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, VNM))
    dense, hessian = weight(6, cols), gram(cols)
    found = []
    for size in sizes:
        monkeypatch.setattr(module, name, size)
        found.append(sweep([dense], hessian, 0.0, pattern))

    for kept in found:
        assert torch.equal(found[0] != 0, kept != 0)
        torch.testing.assert_close(found[0], kept, rtol=1e-3, atol=1e-4)


@given(st.one_of(nm_patterns(9), vnm_patterns(5, 9)), ROWS, COLS, SEEDS, st.floats(0, 1))
def test_the_ridge_stands_on_the_diagonal_and_what_is_given_stays(
    pattern: NM | VNM, rows: int, cols: int, seed: int, ridge: float
) -> None:
    dense, matrix = weight(rows, cols, seed), gram(cols, seed)
    given_weight, given_gram = dense.clone(), matrix.clone()
    kept = sweep([dense], matrix, ridge, pattern)

    assert torch.equal(given_weight, dense)
    assert torch.equal(given_gram, matrix)
    # Groups are ordered by their energy without the ridge: it adds the same to all but the tail, which is last.
    damped = matrix + ridge * torch.eye(cols)
    error = loss(dense, kept, damped)
    assert pytest.approx(loss(dense, sweep([dense], damped, 0.0, pattern), damped), rel=FP32) == error


@given(st.integers(1, 70), st.integers(1, 80), SEEDS)
def test_the_factor_is_upper_triangular_and_its_square_the_matrix(cols: int, size: int, seed: int) -> None:
    hessian = gram(cols, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FACTORED", size)
        place = hessian.clone()
        found = upper_factor_(place)

    factor = found.triu()
    assert found.data_ptr() == place.data_ptr()
    assert (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor @ factor.T, hessian, rtol=1e-3, atol=1e-4 * float(hessian.max()))


@pytest.mark.parametrize("cols", [8, 300])
@pytest.mark.parametrize("text", ["2:4", "4:2:5"])
def test_a_matrix_that_is_not_positive_definite_is_an_error(text: str, cols: int) -> None:
    pattern, matrix = Pattern.parse(text), torch.eye(cols)
    assert isinstance(pattern, (NM, VNM))
    matrix[0, 1] = matrix[1, 0] = 2.0

    with pytest.raises(torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        sweep([weight(3, cols)], matrix, 0.01, pattern)
    assert torch.isfinite(sweep([weight(3, cols)], matrix, 1.5, pattern)).all()


@given(st.integers(2, 6), st.integers(1, 5), SEEDS)
@settings(max_examples=30)
def test_one_group_is_solved_exactly(m: int, rows: int, seed: int) -> None:
    """With a single group, greedy is no guess: the best of all sets with its best values."""
    from core.oneshot.problems import least_squares

    dense, hessian = weight(rows, m, seed), gram(m, seed)
    kept = sweep([dense], hessian, 0.0, NM(1 + m // 3, m))
    sets = sets_of(m, 1 + m // 3)
    assert sets is not None
    for row in range(rows):
        one = dense[row : row + 1]
        masks = [torch.zeros(1, m, dtype=torch.bool).index_fill(1, chosen, True) for chosen in sets]
        best = min(loss(one, least_squares(one, hessian, mask).float(), hessian) for mask in masks)
        assert pytest.approx(best, rel=FP32, abs=FP32 * loss(one, torch.zeros_like(one), hessian)) == loss(
            one, kept[row : row + 1], hessian
        )


# The compiled part ----------------------------------------------------------------------------------------------------

compiled = pytest.mark.skipif(not native.available(), reason="sparsec was installed without a C++ compiler")
TEXTS = ["1:4", "2:4", "4:8", "3:7", "64:2:5", "24:2:8", "300:2:6", "4:2:4"]


@compiled
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("text", TEXTS)
def test_compiled_code_gives_what_torch_gives_at_every_residue(
    monkeypatch: pytest.MonkeyPatch, text: str, level: str
) -> None:
    """Rows around a vector and around what is taken at a time, columns around a block; parts of several weights.

    Where two sets are equally good, rounding may choose: a row of a matrix at most, and its loss stays what it was.
    """
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, VNM))
    for rows, cols in [(1, 16), (15, 127), (17, 128), (63, 131), (65, 33), (130, 150)]:
        dense, hessian = weight(rows, cols), gram(cols)
        parts = list(dense.split(max(1, rows // 2)))
        monkeypatch.setenv("SPARSEC_ISA", "reference")
        assert not native.available()
        expected = sweep(parts, hessian, 0.01, pattern)
        monkeypatch.setenv("SPARSEC_ISA", level)
        found = sweep(parts, hessian, 0.01, pattern)

        same = ((expected != 0) == (found != 0)).all(1)
        assert len(same) - 1 <= same.sum()
        torch.testing.assert_close(found[same], expected[same], rtol=1e-3, atol=1e-4)
        assert pytest.approx(loss(dense, expected, hessian), rel=FP32) == loss(dense, found, hessian)


def test_a_weight_that_is_stored_transposed_is_pruned_the_same() -> None:
    dense, hessian = weight(20, 30), gram(30)

    assert torch.equal(
        sweep([dense], hessian, 0.01, NM(2, 4)), sweep([dense.T.contiguous().T], hessian, 0.01, NM(2, 4))
    )


@compiled
def test_rows_do_not_depend_on_threads_or_on_each_other() -> None:
    dense, hessian = weight(300, 140), gram(140)
    whole = sweep([dense], hessian, 0.01, NM(2, 4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(whole, sweep([dense], hessian, 0.01, NM(2, 4)))
    finally:
        torch.set_num_threads(before)

    torch.testing.assert_close(whole[64:128], sweep([dense[64:128]], hessian, 0.01, NM(2, 4)), rtol=1e-4, atol=1e-5)


@given(st.one_of(nm_patterns(9), vnm_patterns(5, 9)), ROWS, COLS, SEEDS)
@settings(max_examples=30)
def test_without_compiled_code_the_pattern_holds_too(pattern: NM | VNM, rows: int, cols: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEC_ISA", "reference")
        check(pattern, sweep([weight(rows, cols, seed)], gram(cols, seed), 0.0, pattern))


def test_a_missing_library_is_said_once_and_an_unknown_level_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("SPARSEC_ISA", raising=False)
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    native._load.cache_clear()
    try:
        for _ in range(2):
            check(NM(2, 4), sweep([weight(3, 8)], gram(8), 0.0, NM(2, 4)))
    finally:
        native._load.cache_clear()

    assert ["SparseGPT runs without compiled code, which takes longer: install a C++ compiler, reinstall sparsec"] == [
        record.message for record in caplog.records
    ]
    monkeypatch.setenv("SPARSEC_ISA", "avx1024")
    with pytest.raises(UsageError, match="avx1024 is not known; expected one of portable, avx2, avx512, reference"):
        native.available()
