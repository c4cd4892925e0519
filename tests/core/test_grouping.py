"""The largest of each group: by comparing and by sorting, with ties, in any memory layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import weights
from torch import Tensor

from sparsec import grouping
from sparsec.grouping import MOST_COMPARED, Violations, kept_of, largest, offenders, offsets_of, two_of_four


def top(values: list[float], count: int) -> list[int]:
    """Offsets of the largest, ascending; of equal ones the lowest."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@st.composite
def cases(draw: st.DrawFn, most: int) -> tuple[Tensor, int]:
    """Groups (rows, groups, m) of scores, signed and with ties, and how many are kept of each."""
    shape = (draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, most)))
    groups = draw(weights(shape))
    if draw(st.booleans()):
        groups = groups.clamp(-1, 1).round()  # hardly anything but ties
    return groups, draw(st.integers(1, shape[2]))


@given(cases(20))
def test_the_largest_are_kept_and_the_lowest_of_equals(case: tuple[Tensor, int]) -> None:
    groups, n = case
    found = largest(groups, n)

    assert (torch.uint8, (*groups.shape[:2], n)) == (found.dtype, tuple(found.shape))
    assert found.is_contiguous()
    assert [[top(group, n) for group in row] for row in groups.tolist()] == found.tolist()


@given(cases(MOST_COMPARED))
def test_comparing_gives_what_sorting_gives(case: tuple[Tensor, int]) -> None:
    groups, n = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "MOST_COMPARED", 0)
        by_sorting = largest(groups, n)

    assert torch.equal(by_sorting, largest(groups, n))


@given(st.integers(1, 5), st.integers(1, 12), st.sampled_from([4, 8, 1 << 17]), st.data())
def test_two_of_four_are_the_same_whatever_is_compared_at_once(
    rows: int, groups: int, chunk: int, data: st.DataObject
) -> None:
    scores = data.draw(weights((rows, 4 * groups)))
    if data.draw(st.booleans()):
        scores = scores.clamp(-1, 1).round()  # hardly anything but ties, and zeros of both signs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "_CHUNK", chunk)
        mask, offsets = two_of_four(scores)

    expected = [[top(group, 2) for group in row] for row in scores.view(rows, groups, 4).tolist()]
    assert (torch.bool, torch.uint8) == (mask.dtype, offsets.dtype)
    assert expected == offsets.tolist()
    assert torch.equal(mask, torch.zeros(rows, groups, 4).scatter_(2, offsets.long(), 1).view(rows, -1).bool())


@given(cases(MOST_COMPARED), st.booleans())
def test_exactly_n_are_kept_whatever_the_memory_layout(case: tuple[Tensor, int], contiguous: bool) -> None:
    groups, n = case
    entries = groups.permute(2, 0, 1)
    before = entries.clone()
    kept = kept_of(entries.contiguous() if contiguous else entries, n)

    assert torch.bool == kept.dtype and entries.shape == kept.shape
    assert (kept.sum(0) == n).all()
    assert torch.equal(
        torch.zeros_like(groups).scatter_(2, largest(groups, n).long(), 1).permute(2, 0, 1), kept.float()
    )
    assert torch.equal(before, entries)  # nothing is written to


@given(cases(MOST_COMPARED))
def test_offsets_are_those_of_the_flags(case: tuple[Tensor, int]) -> None:
    groups, n = case
    kept = kept_of(groups.permute(2, 0, 1), n)
    flags = kept.clone()
    found = offsets_of(kept, n)

    expected = [
        [[m for m in range(len(kept)) if kept[m, r, g]] for g in range(kept.shape[2])] for r in range(len(groups))
    ]
    assert expected == found.tolist()
    assert torch.uint8 == found.dtype
    assert torch.equal(flags, kept)


def test_no_number_of_entries_up_to_the_most_compared_overflows() -> None:
    groups = torch.arange(MOST_COMPARED, dtype=torch.float32).expand(2, 3, MOST_COMPARED)
    for n in range(1, MOST_COMPARED + 1):
        assert [list(range(MOST_COMPARED - n, MOST_COMPARED))] * 3 == largest(groups, n)[0].tolist()
        assert [list(range(n))] * 3 == largest(groups * 0, n)[1].tolist()


def test_no_offender_is_no_violation_and_counts_are_those_beyond_the_limit() -> None:
    counts = torch.tensor([[[1, 2], [3, 2], [4, 5]]])

    assert Violations(0, ()) == offenders(counts, 5, "row", 1)
    assert Violations(0, ()) == offenders(counts[..., 0], 4, "rows from", 64)
    assert 3 == offenders(counts, 2, "row", 1).count
    assert (
        "row 1, group 0: 3 nonzero columns, at most 2 allowed",
        "row 2, group 0: 4 nonzero columns, at most 2 allowed",
        "row 2, group 1: 5 nonzero columns, at most 2 allowed",
    ) == offenders(counts, 2, "row", 1).first
    assert ("rows from 128: 4 nonzero columns, at most 3 allowed",) == offenders(
        counts[..., 0], 3, "rows from", 64
    ).first
