"""Which columns a strip of rows keeps, from all columns of the weight, and how they are dealt into groups of four.

A strip of V rows holds G = ceil(C / M) groups of 4 columns; each row keeps 2 of every group. Retained score: the sum
over rows and groups of the two largest scores. The search, for all strips at once:
1. Take the 4 * G columns of largest energy and deal them by energy, to and fro, so that groups are alike.
2. For each of the 4 slots in turn, all groups exchange the columns in that slot by linear assignment, with the columns
   that no group holds as further candidates. Keeping everything is one of the assignments, so no step loses score.
   (Columns permuted slot by slot: "Beyond 2:4", arXiv 2410.16135, and RIA, ICLR 2024.)
3. A strip that would keep less than windows of M columns do starts again from those windows.
4. A strip that was pruned already, and whose zeros show its groups, keeps them (see `regroup`).

Where C < 4 * G, the spare slots are columns C, C + 1, ... of score 0 during the search; they stay in the last group.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparsec.columns import COLUMNS_PER_BLOCK, Solver, choose
from sparsec.grouping import pad_columns
from sparsec.regroup import groups_of

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3  # of all four slots; a fourth gains less than 0.0005 of the score on MiniLM
_GAIN = 1e-6  # relative: an exchange must gain more than float32 rounds
_CHUNK_ELEMENTS = 1 << 22  # scores searched at once


def strip_columns(score: Tensor, v: int, m: int, solver: Solver = "greedy", rounds: int = ROUNDS) -> Tensor:
    """The columns of every strip, (strips, groups, 4) int32, in the form of `canonical`. Deterministic.

    score: (rows, cols) finite, not negative. solver: `l1` keeps the columns of largest sum, `l2` of largest sum of
    squares (and retains squares: a Euclidean projection of |weight|); `greedy` and `exact` are one search, in which
    columns are not fixed beforehand. Ties go to the lowest column. `rounds` of step 2.
    """
    import torch

    rows, cols = score.shape
    score = score.detach().float().cpu()
    score = torch.nn.functional.pad(score, (0, 0, 0, -rows % v))
    step = max(1, _CHUNK_ELEMENTS // (v * cols))
    parts = [_columns(part, m, solver, rounds) for part in score.view(-1, v, cols).split(step)]
    return canonical(torch.cat(parts), cols).to(torch.int32)


def _columns(score: Tensor, m: int, solver: Solver, rounds: int) -> Tensor:
    """As `_search`, which step 4 may spare."""
    import torch

    groups = math.ceil(score.shape[2] / m)
    known = [groups_of(strip, groups) for strip in score]
    columns = score.new_empty(len(score), groups, COLUMNS_PER_BLOCK, dtype=torch.int64)
    unknown = torch.tensor([one is None for one in known])
    if bool(unknown.any()):
        columns[unknown] = _search(score[unknown], m, solver, rounds)
    for strip, one in enumerate(known):
        if one is not None:
            columns[strip] = one
    return columns


def canonical(columns: Tensor, cols: int) -> Tensor:
    """The one table that stands for a choice of columns: ascending in a group, groups by their first column.

    columns: (..., groups, 4) of integers. A slot at or beyond `cols`, or one that repeats a column of its group, is
    spare; spare slots go to the end of their group, as its last real column, and a group that has some goes last.
    """
    import torch

    columns = columns.long().sort(-1).values
    spare = columns >= cols
    spare[..., 1:] |= columns[..., 1:] == columns[..., :-1]
    columns = columns.masked_fill(spare, cols).sort(-1).values
    spare = columns >= cols
    last = columns.masked_fill(spare, -1).amax(-1, keepdim=True)
    columns = torch.where(spare, last, columns)
    order = (columns[..., 0] + cols * spare.any(-1)).argsort(-1)
    return columns.gather(-2, order[..., None].expand(columns.shape))


def real_in_last(cols: int, m: int) -> int:
    """How many of the last group's 4 slots have a column: 4, except where there are fewer columns than slots."""
    return min(COLUMNS_PER_BLOCK, cols - COLUMNS_PER_BLOCK * (math.ceil(cols / m) - 1))


def _search(score: Tensor, m: int, solver: Solver, rounds: int) -> Tensor:
    """score (strips, V, cols) -> columns (strips, groups, 4) int64, spare slots at `cols` and above."""
    import torch

    cols = score.shape[2]
    groups, spare = math.ceil(cols / m), COLUMNS_PER_BLOCK - real_in_last(cols, m)
    # By a power of 2, which changes no order: sums and squares of large scores would be Inf, of small ones 0.
    largest = torch.frexp(score.amax((1, 2), keepdim=True)).exponent.clamp(-100, 128)
    score = torch.ldexp(score, -largest)
    worth = score.square() if solver == "l2" else score  # no less than 0, so the two largest stay the two largest
    by_column = torch.nn.functional.pad(worth, (0, spare)).transpose(1, 2).contiguous()
    energy = by_column.sum(2).index_fill_(1, torch.arange(cols, cols + spare), -1)
    fixed = solver in ("l1", "l2")
    found = _improve(by_column, _deal(energy, groups, spare), groups, spare, rounds, fixed)
    windows = _windows(score, energy, m, solver)
    worse = _retained(by_column, windows, groups) > _retained(by_column, found, groups)
    if bool(worse.any()):
        found[worse] = _improve(by_column[worse], windows[worse], groups, spare, rounds, fixed)
    return found[:, : COLUMNS_PER_BLOCK * groups].view(-1, COLUMNS_PER_BLOCK, groups).transpose(1, 2)


# An order, (strips, columns) int64, lists the columns in slot 0 of every group, then those in slot 1, 2 and 3, and last
# those that no group holds, ascending.


def _deal(energy: Tensor, groups: int, spare: int) -> Tensor:
    """Step 1: the order in which columns of falling energy go to the groups 0, 1, ... G - 1, G - 1, ... 0, 0, 1, ..."""
    import torch

    slots, columns = COLUMNS_PER_BLOCK * groups, energy.shape[1]
    ranked = energy.argsort(dim=1, descending=True, stable=True)  # stable: the lowest index wins a tie
    path = torch.arange(slots).view(COLUMNS_PER_BLOCK, groups)
    path[1::2] = path[1::2].flip(1)
    held = torch.arange(COLUMNS_PER_BLOCK - spare + 1, COLUMNS_PER_BLOCK + 1) * groups - 1  # spare: of the last group
    path = path[~torch.isin(path, held)]
    order = torch.empty_like(ranked)
    order[:, path] = ranked[:, : slots - spare]
    order[:, held] = torch.arange(columns - spare, columns)
    order[:, slots:] = ranked[:, slots:].sort(1).values
    return order


def _windows(score: Tensor, energy: Tensor, m: int, solver: Solver) -> Tensor:
    """The order that windows of M columns make; a tail of fewer than 4 is filled up with the best columns left."""
    import torch

    strips, v, cols = score.shape
    groups = math.ceil(cols / m)
    blocks = pad_columns(score.reshape(strips * v, cols), m).view(strips, v, groups, m).transpose(1, 2)
    chosen = choose(blocks.reshape(-1, v, m), "greedy" if solver == "exact" else solver).view(strips, groups, -1)
    chosen += torch.arange(groups)[:, None] * m
    tail = min(COLUMNS_PER_BLOCK, cols - (groups - 1) * m)
    taken = torch.zeros_like(energy, dtype=torch.bool).scatter_(1, chosen.flatten(1).clamp(max=cols - 1), True)
    rest = energy.masked_fill(taken, -2).argsort(dim=1, descending=True, stable=True)
    chosen[:, -1, tail:] = rest[:, : COLUMNS_PER_BLOCK - tail]
    order = chosen.transpose(1, 2).flatten(1)
    free = torch.ones_like(taken).scatter_(1, order, False)
    return torch.cat([order, free.nonzero()[:, 1].view(strips, -1)], 1)


def _retained(by_column: Tensor, order: Tensor, groups: int) -> Tensor:
    """Retained score of every strip, float64. by_column: (strips, columns, V)."""
    in_slots = [_pick(by_column, order[:, slot * groups : (slot + 1) * groups]) for slot in range(COLUMNS_PER_BLOCK)]
    high, low = _sorted(*in_slots[:2])
    high_too, low_too = _sorted(*in_slots[2:])
    first, other = _sorted(high, high_too)
    second = other.maximum(low.maximum(low_too))
    return (first + second).double().sum((1, 2))


def _improve(by_column: Tensor, order: Tensor, groups: int, spare: int, rounds: int, fixed: bool) -> Tensor:
    """Step 2: an order that retains no less. `fixed`: columns in no group stay out."""
    order = order.clone()
    for _ in range(rounds):
        moved = [_exchange(by_column, order, slot, groups, spare, fixed) for slot in range(COLUMNS_PER_BLOCK)]
        if not any(moved):
            break
    return order


def _exchange(by_column: Tensor, order: Tensor, slot: int, groups: int, spare: int, fixed: bool) -> bool:
    """Reassign one slot of all groups, in place; whether any strip gained."""
    import torch
    from scipy.optimize import linear_sum_assignment

    members = groups - (slot >= COLUMNS_PER_BLOCK - spare)  # a spare slot is not exchanged
    places = torch.arange(slot * groups, slot * groups + members)
    if not fixed:
        places = torch.cat([places, torch.arange(COLUMNS_PER_BLOCK * groups, order.shape[1])])
    if not members or len(places) < 2:
        return False
    others = [
        _pick(by_column, order[:, other * groups : other * groups + members])
        for other in range(COLUMNS_PER_BLOCK)
        if other != slot
    ]
    high, low = _sorted(*others[:2])
    second = low.maximum(high.minimum(others[2]))  # a column adds to a row what it exceeds this by
    candidates = order[:, places]
    scores = _pick(by_column, candidates)
    # The sum over rows of max(score, second), less what every assignment has in common: half of |score - second|.
    worth = (torch.cdist(second, scores, p=1) + scores.sum(2)[:, None]).double().numpy() / 2
    gained = False
    for strip, table in enumerate(worth):
        picked = linear_sum_assignment(table, maximize=True)[1]
        if table[range(members), picked].sum() <= table.trace() * (1 + _GAIN):
            continue
        gained = True
        left = torch.ones(len(places), dtype=torch.bool)
        left[picked] = False
        order[strip, places[:members]] = candidates[strip, picked]
        order[strip, places[members:]] = candidates[strip, left].sort().values
    return gained


def _pick(by_column: Tensor, columns: Tensor) -> Tensor:
    """(strips, columns, V) -> the rows of scores of some columns of each strip."""
    return by_column.gather(1, columns[:, :, None].expand(-1, -1, by_column.shape[2]))


def _sorted(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.maximum(b), a.minimum(b)
