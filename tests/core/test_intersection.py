"""What two patterns at once keep, against every subset of a row; and which patterns imply which."""

from __future__ import annotations

import dataclasses
import doctest
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    intersections,
    nm_patterns,
    scores,
    strip_patterns,
    unstructured_patterns,
    vnm_patterns,
    weights,
)
from torch import Tensor

from sparsec import intersection as module
from sparsec.errors import ArtifactError, PatternError
from sparsec.intersection import Intersection
from sparsec.layout import compress, decompress, table_bytes
from sparsec.pattern import NM, VNM, Dense, Pattern
from sparsec.selection import Selection
from sparsec.selection_checks import check_selection

SUM_ORDER = 1e-5  # relative: two fp32 sums of at most 12 terms in different orders


def in_reach(pattern: Intersection, selection: Selection, shape: tuple[int, ...]) -> Tensor:
    """(batch, rows, cols) bool: the columns that a selection leaves to each row."""
    if isinstance(pattern.first, NM):
        return torch.ones(shape, dtype=torch.bool)
    index = pattern.first.absolute_columns(selection, shape[2]).flatten(2)
    return torch.zeros(shape, dtype=torch.bool).scatter_(2, index, True)


def subsets(cols: int) -> Tensor:
    """Every subset of the columns, (2**cols, cols) bool."""
    return (torch.arange(2**cols)[:, None] >> torch.arange(cols)) % 2 == 1


def rows_that_follow(pattern: NM | VNM, rows: Tensor) -> Tensor:
    """(count,) bool: whether each row by itself keeps to `pattern`, of which only the counts in a row matter."""
    groups = torch.nn.functional.pad(rows, (0, -rows.shape[1] % pattern.m)).unflatten(1, (-1, pattern.m))
    return (groups.sum(2) <= pattern.n).all(1)


# What is kept ---------------------------------------------------------------------------------------------------------


@given(pattern=intersections(7), cols=st.integers(1, 10), data=st.data())
def test_every_row_keeps_as_much_as_any_subset_of_its_columns(
    pattern: Intersection, cols: int, data: st.DataObject
) -> None:
    score = data.draw(scores((1, 4, cols)))
    selection, mask = pattern.choose(score)

    every = subsets(cols)
    legal = every[rows_that_follow(pattern.first, every) & rows_that_follow(pattern.second, every)]
    for row, kept, reach in zip(score[0], mask[0], in_reach(pattern, selection, (1, 4, cols))[0], strict=True):
        most = (legal[~(legal & ~reach).any(1)].double() @ row.double()).max()
        assert float(most) == pytest.approx(float(row[kept].double().sum()), rel=SUM_ORDER)


def test_twelve_columns_are_solved_exactly_too() -> None:
    every = subsets(12)
    for text in ("2:5+2:4", "2:7+2:4", "3:5+1:3", "64:2:5+2:4", "4:2:6+3:8"):
        pattern = Pattern.parse(text)
        assert isinstance(pattern, Intersection)
        score = torch.randn(1, 40, 12, generator=torch.Generator().manual_seed(1)).abs()
        selection, mask = pattern.choose(score)
        legal = every[rows_that_follow(pattern.first, every) & rows_that_follow(pattern.second, every)].float()
        reach = in_reach(pattern, selection, (1, 40, 12))[0]
        allowed = (legal @ (~reach).float().T) == 0
        most = (legal @ score[0].T).masked_fill(~allowed, -1).max(0).values

        assert torch.allclose(most, (score * mask)[0].sum(1), rtol=SUM_ORDER), text


@given(pattern=intersections(), data=st.data())
def test_a_mask_follows_both_patterns_and_keeps_all_that_it_may(pattern: Intersection, data: st.DataObject) -> None:
    score = data.draw(scores())
    selection, mask = pattern.choose(score)

    assert not pattern.first.violations(mask).count
    assert not pattern.second.violations(mask).count
    assert not (mask & ~pattern.first.mask(selection, score.shape[2])).any()
    more = in_reach(pattern, selection, score.shape) & ~mask
    for b, r, c in more.nonzero().tolist():
        row = mask[b, r][None].clone()
        row[0, c] = True
        both = rows_that_follow(pattern.first, row) & rows_that_follow(pattern.second, row)
        assert not bool(both), f"row {r} of matrix {b} could keep column {c} too"


@given(pattern=intersections(), data=st.data())
def test_a_weight_that_follows_both_keeps_every_nonzero_however_small(
    pattern: Intersection, data: st.DataObject
) -> None:
    weight = data.draw(weights())
    spread = torch.logspace(-30, 8, weight.shape[2])[
        torch.randperm(weight.shape[2], generator=torch.Generator().manual_seed(0))
    ]
    weight = torch.where(pattern.choose(weight.abs())[1], weight * spread, 0.0)

    assert not (~pattern.choose(weight.abs(), "l1")[1] & (weight != 0)).any()


def test_without_a_second_thought_the_first_pattern_is_kept() -> None:
    score = torch.randn(2, 9, 23, generator=torch.Generator().manual_seed(0)).abs()
    for text in ("2:4", "3:2:8", "4:2:5"):
        first = Pattern.parse(text)
        assert isinstance(first, (NM, VNM))

        assert torch.equal(first.choose(score)[1], Intersection(first, NM(8, 8)).choose(score)[1])


def test_equal_scores_go_to_the_lowest_columns() -> None:
    pattern = Intersection(NM(2, 5), NM(2, 4))
    for score in (torch.zeros(1, 1, 11), torch.ones(1, 1, 11)):
        assert [0, 1, 5, 6, 10] == pattern.choose(score)[1][0, 0].nonzero().flatten().tolist()


def test_rows_are_independent_of_how_many_are_solved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, score = Intersection(VNM(4, 2, 5), NM(2, 4)), torch.rand(2, 37, 43)
    whole = pattern.choose(score)[1]
    monkeypatch.setattr(module, "_CHUNK_STATES", 1000)

    assert torch.equal(whole, pattern.choose(score)[1])


# Text, words, implication ---------------------------------------------------------------------------------------------


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(module)

    assert (2, 0) == (result.attempted, result.failed)


def test_an_intersection_is_read_and_explained() -> None:
    pattern = Pattern.parse("64:2:5+2:4")

    assert Intersection(VNM(64, 2, 5), NM(2, 4)) == pattern
    assert VNM(64, 2, 5) == pattern.executable
    assert pattern.words == "keep 2 of 5 (60 % zeros), V=64, and at most 2 of every 4 columns"
    assert pattern.density == 0.4


@pytest.mark.parametrize(("text", "first"), [("64:2:8+2:4", "64:2:8"), ("2:4+2:4", "2:4"), ("2:5+4:4", "2:5")])
def test_a_second_pattern_that_is_implied_is_left_out(text: str, first: str) -> None:
    assert Pattern.parse(first) == Pattern.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64:2:5+2:4+1:8", "joins 3 patterns; expected two"),
        ("2:5++2:4", "joins 3 patterns; expected two"),
        ("2:4+64:2:5", "found 2:4 and 64:2:5"),
        ("64:2:5@strip+2:4", "found 64:2:5@strip and 2:4"),
        ("unstructured:0.5+2:4", "found unstructured:0.5 and 2:4"),
        ("2:5+dense", "found 2:5 and dense"),
        ("2:5+", "'2:5+': pattern '' cannot be read"),
        ("+2:4", "'' cannot be read"),
        ("2:5+3:2", "1 <= N <= M must hold"),
    ],
)
def test_other_pairs_are_refused_by_what_was_found(text: str, message: str) -> None:
    with pytest.raises(PatternError, match=re.escape(message)):
        Pattern.parse(text)


ANY = st.one_of(
    nm_patterns(12),
    vnm_patterns(4, 12),
    strip_patterns(4, 12),
    unstructured_patterns(),
    intersections(),
    st.just(Dense()),
)
IMPLIED = [
    ("2:4", "2:4"), ("64:2:4", "2:4"), ("64:2:8", "2:4"), ("3:2:12", "2:4"), ("1:4", "2:8"), ("2:8", "3:4"),
    ("2:6", "2:3"), ("2:4", "64:2:4"), ("128:2:8", "64:2:8"), ("64:2:16", "64:2:8"), ("2:5", "2:2:5"),
    ("64:2:5+2:4", "2:4"), ("64:2:5+2:4", "64:2:5"), ("64:2:5+2:4", "2:5"), ("64:2:5+2:4", "64:2:5+2:4"),
    ("2:8", "3:4+2:8"), ("64:2:5", "4:4"), ("2:4", "dense"), ("unstructured:0.7", "unstructured:0.6"),
]  # fmt: skip
NOT_IMPLIED = [
    ("64:2:5", "2:4"), ("64:2:6", "2:4"), ("64:2:7", "2:4"), ("64:2:10", "2:4"), ("2:4", "2:5"), ("2:4", "1:2"),
    ("64:2:8", "128:2:8"), ("2:5", "3:2:5"), ("64:2:5", "64:2:5+2:4"), ("unstructured:0.5", "2:4"), ("dense", "2:4"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "other"), IMPLIED)
def test_an_implied_pattern_is_known(text: str, other: str) -> None:
    assert Pattern.parse(text).implies(Pattern.parse(other))


@pytest.mark.parametrize(("text", "other"), NOT_IMPLIED)
def test_a_pattern_that_some_weight_breaks_is_not_implied(text: str, other: str) -> None:
    assert not Pattern.parse(text).implies(Pattern.parse(other))


@given(pattern=ANY, other=ANY, data=st.data())
def test_what_is_implied_holds_at_every_tail(pattern: Pattern, other: Pattern, data: st.DataObject) -> None:
    score = data.draw(scores())
    kept = torch.ones_like(score) if isinstance(pattern, Dense) else pattern.choose(score)[1]

    assert pattern.implies(pattern) and pattern.implies(Dense())
    if pattern.implies(other):
        assert not other.violations(kept).count


@given(first=st.one_of(nm_patterns(9), vnm_patterns(3, 9)), second=nm_patterns(9))
def test_nm_is_implied_exactly_where_no_row_breaks_it(first: NM | VNM, second: NM) -> None:
    """Rows of one period that fill a window of the second pattern as far as the first allows."""
    span = torch.lcm(torch.tensor(first.m), torch.tensor(second.m)).item()
    broken = False
    for start in range(0, int(span), second.m):
        row = torch.zeros(1, 1, int(span))
        inside = range(start, start + second.m)
        for group in {c // first.m for c in inside}:
            row[0, 0, [c for c in inside if c // first.m == group][: first.n]] = 1
        assert not first.violations(row).count
        broken = broken or bool(second.violations(row).count)

    assert broken != first.implies(second)


# Tables ---------------------------------------------------------------------------------------------------------------


@given(pattern=intersections(), data=st.data())
def test_the_tables_are_those_of_the_first_pattern(pattern: Intersection, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = pattern.project(weight.abs())
    layout = compress(weight, pattern, selection)

    assert pattern.first == layout.pattern
    assert table_bytes(pattern, layout.shape) == table_bytes(pattern.first, layout.shape) == layout.nbytes
    assert not pattern.violations_of(decompress(layout), layout.selection()).count


@given(pattern=intersections(), data=st.data())
def test_a_sound_selection_passes_and_is_found_again_in_its_tables(pattern: Intersection, data: st.DataObject) -> None:
    score = data.draw(scores())
    selection, mask = pattern.choose(score)
    check_selection(pattern, selection, tuple(score.shape), "site")

    named = {f"site:{name}": table for name, table in selection.tensors().items()}
    assert torch.equal(mask, pattern.mask(Selection.of(named, "site:"), score.shape[2]))


def test_a_selection_that_breaks_the_second_pattern_is_refused() -> None:
    pattern = Intersection(NM(2, 5), NM(2, 4))
    selection = pattern.first.project(torch.ones(1, 1, 10).index_fill(2, torch.tensor([3, 4, 6, 7]), 2.0))
    full = dataclasses.replace(selection, kept=torch.ones_like(selection.positions, dtype=torch.bool))

    with pytest.raises(ArtifactError, match=r"site: the kept slots of 2:5\+2:4 break 2:4: row 0, group 1: 3 nonzero"):
        check_selection(pattern, full, (1, 1, 10), "site")
    with pytest.raises(ArtifactError, match=r"must hold .*kept"):
        check_selection(pattern, selection, (1, 1, 10), "site")
    with pytest.raises(ArtifactError, match=r"must hold .*found .*kept"):
        check_selection(pattern.first, full, (1, 1, 10), "site")


def test_a_padding_slot_cannot_be_kept() -> None:
    pattern = Intersection(VNM(2, 2, 5), NM(2, 4))
    selection, _ = pattern.choose(torch.ones(1, 2, 6))
    assert selection.kept is not None
    selection.kept[0, 0, 1, 1] = True  # the tail has one column

    with pytest.raises(ArtifactError, match="site: a padding slot is marked as kept"):
        check_selection(pattern, selection, (1, 2, 6), "site")


def test_violations_name_the_pattern_that_is_broken() -> None:
    weight = torch.zeros(1, 2, 10)
    weight[0, 0, [3, 4, 6, 7]] = 1.0
    weight[0, 1, [0, 2, 4]] = 1.0
    found = Intersection(NM(2, 5), NM(2, 4)).violations(weight)

    assert found.count == 2
    assert found.first == (
        "row 1, group 0: 3 nonzero columns, at most 2 allowed (2:5)",
        "row 0, group 1: 3 nonzero columns, at most 2 allowed (2:4)",
    )
