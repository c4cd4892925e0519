"""What a pattern keeps, against the rule written out a second time, slowly."""

from __future__ import annotations

import doctest
import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    decidable_patterns,
    intersections,
    nm_patterns,
    scores,
    shapes,
    sparse_patterns,
    strip_patterns,
    unstructured_patterns,
    vnm_patterns,
    weights,
)
from torch import Tensor

from sparsec import pattern as pattern_module
from sparsec import pattern_base
from sparsec.columns import SOLVERS, Solver
from sparsec.errors import PatternError
from sparsec.pattern import NM, VNM, Dense, Pattern, Strip, Unstructured, Violations

SUM_ORDER = 1e-5  # relative: two fp32 sums of at most 100 terms in different orders
BAD = [
    "", " ", "banana", "3:2", "64:2", "0:4", "-1:4", "2:4:", ":2:4", "2:", "2:4 ", "2.0:4", "64:3:8", "64:2:3", "0:2:5",
    "64:2:257", "2:300", "unstructured:1.5", "unstructured:0", "unstructured:1", "unstructured:", "unstructured:-0.5",
    "unstructured:nan", "unstructured:1e-3", "DENSE", "٢:٤", "1" * 5000 + ":4",
    "64:2:5@band", "64:2:5@", "2:4@strip", "64:3:8@strip", "64:2:3@strip", "64:2:5@strip@strip",
]  # fmt: skip


def kept_by_row(pattern: Pattern, score: Tensor, columns: Solver = "greedy") -> Tensor:
    return pattern.mask(pattern.project(score, columns), score.shape[-1])


def top(values: list[float], count: int) -> list[int]:
    """Offsets of the largest, ascending; of equal ones the lowest."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


# Text -----------------------------------------------------------------------------------------------------------------


@given(
    pattern=st.one_of(
        nm_patterns(256),
        vnm_patterns(300, 256),
        strip_patterns(300, 256),
        unstructured_patterns(),
        st.just(Dense()),
        intersections(64),
    )
)
def test_text_reads_back_as_the_same_pattern(pattern: Pattern) -> None:
    assert pattern == Pattern.parse(str(pattern))


@pytest.mark.parametrize("text", BAD, ids=lambda text: repr(text[:20]))
def test_a_bad_text_is_refused_in_one_paragraph(text: str) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse(text)

    message = str(caught.value)
    assert "\n" not in message
    assert text[:20] in message
    assert re.search("expected|must|did you mean|supported|defined", message), "it says what to write instead"
    assert len(message) < 6000


@pytest.mark.parametrize(
    ("text", "density", "words"),
    [
        ("2:4", 0.5, "keep 2 of 4 (50 % zeros)"),
        ("1:4", 0.25, "keep 1 of 4 (75 % zeros)"),
        ("2:8", 0.25, "keep 2 of 8 (75 % zeros)"),
        ("64:2:5", 0.4, "keep 2 of 5 (60 % zeros), V=64"),
        ("64:2:6", 1 / 3, "keep 2 of 6 (66.7 % zeros), V=64"),
        ("64:2:5@window", 0.4, "keep 2 of 5 (60 % zeros), V=64"),
        ("64:2:8@strip", 0.25, "keep 2 of 8 (75 % zeros), V=64, columns from anywhere in the strip"),
        ("unstructured:0.7", 0.3, "keep the largest 30 % (70 % zeros)"),
        ("dense", 1.0, "keep all"),
    ],
)
def test_words_and_density_count_what_is_kept(text: str, density: float, words: str) -> None:
    pattern = Pattern.parse(text)

    assert pytest.approx(density) == pattern.density
    assert words == pattern.words


def test_the_examples_in_the_docstrings_hold() -> None:
    results = [doctest.testmod(module) for module in (pattern_module, pattern_base)]

    assert sum(result.attempted for result in results) >= 3
    assert not any(result.failed for result in results)


# N:M ------------------------------------------------------------------------------------------------------------------


@given(pattern=nm_patterns(), data=st.data())
def test_nm_keeps_the_largest_of_each_group_and_the_lowest_of_equals(pattern: NM, data: st.DataObject) -> None:
    score = data.draw(scores())
    mask = kept_by_row(pattern, score)

    for row, kept in zip(score.flatten(0, 1).tolist(), mask.flatten(0, 1).tolist(), strict=True):
        expected = {
            start + offset
            for start in range(0, len(row), pattern.m)
            for offset in top(row[start : start + pattern.m], pattern.n)
        }
        assert expected == {i for i, keep in enumerate(kept) if keep}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (2, 8), (4, 8), (2, 5), (3, 20)])
def test_nm_keeps_min_n_t_of_every_tail(n: int, m: int) -> None:
    for cols in range(1, 2 * m + 1):
        mask = kept_by_row(NM(n, m), torch.zeros(2, cols))

        full, tail = divmod(cols, m)
        assert [full * n + min(n, tail)] * 2 == mask[0].sum(1).tolist(), f"{cols} columns"


def test_nm_works_on_matrices_larger_than_one_chunk() -> None:
    score = torch.arange(600 * 2000, dtype=torch.float32).view(600, 2000) % 97

    assert torch.equal(kept_by_row(NM(2, 4), score)[:, 300:301], kept_by_row(NM(2, 4), score[300:301]))


@given(pattern=sparse_patterns(), data=st.data())
def test_choosing_is_projecting_and_masking(pattern: Pattern, data: st.DataObject) -> None:
    score = data.draw(scores())
    solver = data.draw(st.sampled_from(["l1", "l2", "greedy"]))
    score = score if data.draw(st.booleans()) else score[0]
    selection, mask = pattern.choose(score, solver)
    expected = pattern.project(score, solver)

    assert torch.equal(pattern.mask(expected, score.shape[-1]), mask)
    assert expected.tensors().keys() == selection.tensors().keys()
    for name, table in expected.tensors().items():
        found = selection.tensors()[name]
        assert table.dtype == found.dtype and found.is_contiguous() and torch.equal(table, found)


@given(pattern=nm_patterns(), batch=st.integers(1, 3), rows=st.integers(1, 6), groups=st.integers(1, 4), data=st.data())
def test_choosing_nm_at_once_is_projecting_and_masking_where_no_tail_is_left(
    pattern: NM, batch: int, rows: int, groups: int, data: st.DataObject
) -> None:
    score = data.draw(scores((batch, rows, groups * pattern.m)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pattern_module, "_CHUNK_ELEMENTS", data.draw(st.integers(1, 200)))
        selection, mask = pattern.choose(score)
    expected = pattern.project(score)

    assert torch.equal(expected.positions, selection.positions)
    assert selection.positions.dtype == torch.uint8 and selection.columns is None
    assert torch.equal(pattern.mask(expected, score.shape[2]), mask)


def test_choosing_refuses_what_projecting_refuses() -> None:
    for text in ("2:4", "2:20", "4:2:5", "4:2:5@strip", "unstructured:0.5"):
        with pytest.raises(PatternError, match=f"^{re.escape(text)}: scores must be finite and not negative"):
            Pattern.parse(text).choose(torch.tensor([[1.0, float("nan"), 0.0, 0.0]]))
    with pytest.raises(PatternError, match="dense keeps every weight"):
        Dense().choose(torch.ones(1, 4))


# V:N:M ----------------------------------------------------------------------------------------------------------------


@given(pattern=vnm_patterns(), solver=st.sampled_from(["l1", "l2", "greedy"]), data=st.data())
def test_vnm_keeps_the_two_largest_of_four_shared_columns(pattern: VNM, solver: Solver, data: st.DataObject) -> None:
    score = data.draw(scores())
    selection = pattern.project(score, solver)
    mask = pattern.mask(selection, score.shape[2])

    assert selection.columns is not None
    batch, rows, cols = score.shape
    for b, r, g in itertools.product(range(batch), range(rows), range(pattern.groups(cols))):
        block = slice(g * pattern.m, min((g + 1) * pattern.m, cols))
        width = block.stop - block.start
        columns = sorted(set(selection.columns[b, r // pattern.v, g].tolist()))
        assert min(4, width) == len(columns)
        assert columns[-1] < width
        values = score[b, r, block].tolist()
        expected = {columns[i] for i in top([values[c] for c in columns], 2)}
        assert expected == set(mask[b, r, block].nonzero().flatten().tolist())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("m", [4, 5, 6, 8, 11])
def test_vnm_drops_no_row_and_no_column_at_any_tail(m: int, solver: Solver) -> None:
    v = 3
    for rows, cols in itertools.product(range(1, 2 * v + 1), range(1, 2 * m + 1)):
        score = torch.ones(1, rows, cols)
        mask = kept_by_row(VNM(v, 2, m), score, solver)

        full, tail = divmod(cols, m)
        assert [full * 2 + min(2, tail)] * rows == mask[0].sum(1).tolist(), f"{rows} x {cols}"


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_are_all_zero_keep_the_lowest_columns(solver: Solver) -> None:
    mask = kept_by_row(VNM(2, 2, 6), torch.zeros(3, 14), solver)

    assert [0, 1, 6, 7, 12, 13] == mask[0, 2].nonzero().flatten().tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_equal_columns_go_to_the_lowest_index(solver: Solver) -> None:
    score = torch.tensor([[1.0, 3.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0]]).expand(2, 8)
    selection = VNM(2, 2, 8).project(score, solver)

    assert selection.columns is not None
    assert [0, 1, 2, 4] == selection.columns[0, 0, 0].tolist()


def retained(block: Tensor, columns: tuple[int, ...]) -> float:
    return float(block[:, list(columns)].topk(2, dim=1).values.double().sum())


def best(block: Tensor) -> float:
    return max(retained(block, choice) for choice in itertools.combinations(range(block.shape[1]), 4))


@given(m=st.integers(4, 9), v=st.integers(1, 6), data=st.data())
def test_exact_keeps_as_much_as_any_choice_of_columns(m: int, v: int, data: st.DataObject) -> None:
    score = data.draw(scores((1, v, m)))
    kept = score[kept_by_row(VNM(v, 2, m), score, "exact")].double().sum()

    assert best(score[0]) == pytest.approx(float(kept), rel=SUM_ORDER)


def test_greedy_keeps_nearly_as_much_as_the_best_choice() -> None:
    ratios = []
    for m in (5, 6, 8):
        score = torch.randn(40, 16, m, generator=torch.Generator().manual_seed(m)).abs()
        for block in score:
            kept = block[kept_by_row(VNM(16, 2, m), block)[0]].double().sum()
            ratios.append(float(kept) / best(block))

    assert min(ratios) > 0.98
    assert sum(ratios) / len(ratios) >= 0.999


@pytest.mark.parametrize("solver", ["l1", "l2"])
def test_energy_solvers_take_the_columns_of_largest_energy(solver: Solver) -> None:
    score = torch.randn(8, 7, generator=torch.Generator().manual_seed(1)).abs()
    energy = score.sum(0) if solver == "l1" else score.square().sum(0)
    selection = VNM(8, 2, 7).project(score, solver)

    assert selection.columns is not None
    assert sorted(energy.topk(4).indices.tolist()) == selection.columns[0, 0, 0].tolist()


def test_no_legal_mask_of_a_small_block_keeps_more_than_exact() -> None:
    block = torch.randn(2, 5, generator=torch.Generator().manual_seed(2)).abs()
    kept = float(block[kept_by_row(VNM(2, 2, 5), block, "exact")[0]].sum())

    rows = list(itertools.combinations(range(5), 2))
    for pairs in itertools.product(rows, repeat=2):
        other = torch.zeros(2, 5)
        for row, pair in enumerate(pairs):
            other[row, list(pair)] = 1
        if not VNM(2, 2, 5).violations(other[None]).count:
            assert float((block * other).sum()) <= kept * (1 + SUM_ORDER)


def test_exact_is_refused_beyond_the_m_it_is_meant_for() -> None:
    with pytest.raises(PatternError, match="greedy"):
        VNM(2, 2, 13).project(torch.ones(2, 13), "exact")


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(PatternError, match="l1, l2, greedy, exact"):
        VNM(2, 2, 5).project(torch.ones(2, 5), "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("solver", ["l1", "greedy"])
def test_strips_are_independent_of_how_many_are_projected_at_once(solver: Solver) -> None:
    score = torch.randn(4096, 515, generator=torch.Generator().manual_seed(3)).abs()  # two chunks
    whole = kept_by_row(VNM(64, 2, 5), score, solver)[0]

    assert torch.equal(whole[2048:2112], kept_by_row(VNM(64, 2, 5), score[2048:2112], solver)[0])


# Unstructured ---------------------------------------------------------------------------------------------------------


@given(pattern=unstructured_patterns(), data=st.data())
def test_unstructured_keeps_the_largest_of_each_matrix(pattern: Unstructured, data: st.DataObject) -> None:
    score = data.draw(scores())
    mask = kept_by_row(pattern, score)

    count = pattern.kept(*score.shape[1:])
    for matrix, kept in zip(score, mask, strict=True):
        assert top(matrix.flatten().tolist(), count) == kept.flatten().nonzero().flatten().tolist()


# All ------------------------------------------------------------------------------------------------------------------


@given(pattern=decidable_patterns(), data=st.data())
def test_projecting_a_projected_weight_changes_nothing(pattern: Pattern, data: st.DataObject) -> None:
    score = data.draw(scores())
    once = torch.where(kept_by_row(pattern, score), score, 0.0)

    assert torch.equal(once, torch.where(kept_by_row(pattern, once), once, 0.0))


@given(pattern=sparse_patterns(), data=st.data())
def test_equal_scores_give_an_equal_selection(pattern: Pattern, data: st.DataObject) -> None:
    score = data.draw(scores())
    first, second = pattern.project(score).tensors(), pattern.project(score.clone()).tensors()

    assert all(torch.equal(first[name], second[name]) for name in first)
    columns = torch.int32 if isinstance(pattern, Strip) else torch.uint8
    types = {"positions": torch.uint8, "columns": columns, "kept": torch.bool}
    assert types == types | {name: table.dtype for name, table in first.items()}


@given(pattern=sparse_patterns(), data=st.data())
def test_batch_items_do_not_see_each_other(pattern: Pattern, data: st.DataObject) -> None:
    score = data.draw(scores())

    assert torch.equal(kept_by_row(pattern, score), torch.cat([kept_by_row(pattern, matrix) for matrix in score]))


@pytest.mark.parametrize("text", ["2:4", "4:2:5", "4:2:5@strip", "unstructured:0.5"])
@pytest.mark.parametrize(
    "score",
    [torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, float("inf")]]), torch.tensor([[1.0, -1.0]]),
     torch.zeros(0, 4), torch.zeros(2, 0), torch.zeros(4), torch.zeros(1, 1, 1, 4)],
    ids=["nan", "inf", "negative", "no rows", "no columns", "vector", "4-D"],
)  # fmt: skip
def test_scores_that_rank_nothing_are_refused(text: str, score: Tensor) -> None:
    with pytest.raises(PatternError, match=f"^{re.escape(text)}: "):
        Pattern.parse(text).project(score)


def test_dense_selects_nothing() -> None:
    with pytest.raises(PatternError, match="keeps every weight"):
        Dense().project(torch.ones(2, 4))


# Violations -----------------------------------------------------------------------------------------------------------


@given(pattern=sparse_patterns(), data=st.data())
def test_a_projected_weight_has_no_violations(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    kept = torch.where(kept_by_row(pattern, weight.abs()), weight, 0.0)

    assert Violations(0, ()) == pattern.violations(kept)


@given(pattern=nm_patterns(), data=st.data())
def test_violations_of_nm_are_those_counted_group_by_group(pattern: NM, data: st.DataObject) -> None:
    weight = data.draw(weights())
    if data.draw(st.booleans()):
        weight = weight.transpose(0, 1)  # not contiguous
    bad = []
    for b, matrix in enumerate(weight.tolist()):
        for r, row in enumerate(matrix):
            for g, start in enumerate(range(0, len(row), pattern.m)):
                count = sum(value != 0 for value in row[start : start + pattern.m])
                if count > pattern.n:
                    of = f" of matrix {b}" if len(weight) > 1 else ""
                    bad.append(f"row {r}{of}, group {g}: {count} nonzero columns, at most {pattern.n} allowed")

    assert Violations(len(bad), tuple(bad[:3])) == pattern.violations(weight)


def test_a_group_of_256_nonzeros_is_counted_to_the_end() -> None:
    found = NM(255, 256).violations(torch.ones(1, 1, 256))

    assert Violations(1, ("row 0, group 0: 256 nonzero columns, at most 255 allowed",)) == found


def test_every_group_with_too_many_nonzeros_is_counted_and_the_first_are_named() -> None:
    weight = torch.zeros(1, 3, 10)
    weight[0, 1, 4:7] = 1.0
    weight[0, 2] = float("nan")  # NaN is not zero; the tail of 2 columns may keep both
    found = NM(2, 4).violations(weight)

    assert 3 == found.count
    assert "row 1, group 1: 3 nonzero columns, at most 2 allowed" == found.first[0]
    assert "row 2, group 0: 4 nonzero columns, at most 2 allowed" == found.first[1]


def test_a_matrix_of_a_batch_is_named() -> None:
    weight = torch.zeros(3, 2, 4)
    weight[2, 1] = 1.0

    assert ("row 1 of matrix 2, group 0: 4 nonzero columns, at most 2 allowed",) == NM(2, 4).violations(weight).first


def test_a_fifth_column_in_a_block_is_a_violation_even_when_each_row_has_two() -> None:
    weight = torch.zeros(1, 6, 7)
    for row, pair in enumerate([(0, 1), (2, 3), (4, 5)]):  # V=3: rows 0-2 share six columns
        weight[0, row, list(pair)] = 1.0
    found = VNM(3, 2, 7).violations(weight)

    assert 1 == found.count
    assert ("rows from 0, group 0: 6 nonzero columns, at most 4 allowed",) == found.first
    assert 0 == VNM(1, 2, 7).violations(weight).count


def test_a_third_weight_in_a_row_is_a_violation_in_a_short_last_strip() -> None:
    weight = torch.zeros(1, 4, 10)
    weight[0, 3, 5:8] = 1.0
    found = VNM(3, 2, 5).violations(weight)

    assert Violations(1, ("row 3, group 1: 3 nonzero columns, at most 2 allowed",)) == found


def test_unstructured_allows_the_count_it_keeps() -> None:
    weight = torch.ones(2, 4, 5)
    weight[0, :2] = 0

    assert Violations(1, ("matrix 1: 20 nonzeros, at most 10 allowed",)) == Unstructured(0.5).violations(weight)


def test_dense_has_no_violations() -> None:
    assert 0 == Dense().violations(torch.ones(1, 2, 2)).count


@given(shape=shapes(), m=st.integers(4, 12))
def test_no_more_than_three_offenders_are_named(shape: tuple[int, int, int], m: int) -> None:
    found = VNM(2, 2, m).violations(torch.ones(shape))

    assert min(3, found.count) == len(found.first)
