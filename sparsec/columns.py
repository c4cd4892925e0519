"""Choose the 4 columns that V rows share: the column step of a V:N:M projection.

Every solver takes `score`: (blocks, V, M) float, not negative, with padding columns (of a tail group) at -1,
and returns (blocks, 4) int64, ascending. Ties go to the lowest column. Retained score = the sum over the V rows
of the two largest scores among the chosen columns ("Beyond 2:4", arXiv 2410.16135; VENOM, arXiv 2310.02065).
Callers pass few enough blocks at once that a few copies of `score` fit in memory.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

COLUMNS_PER_BLOCK = 4

Solver = Literal["l1", "l2", "greedy", "exact"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
EXACT_MAX_M = 12  # C(12, 4) = 495 combinations; beyond it greedy is within 1e-4 of exact anyway


def choose(score: Tensor, solver: Solver) -> Tensor:
    """Columns of each block, (blocks, 4) int64 ascending, by the named solver."""
    if solver == "l1":
        return _largest(score.clamp(min=0).sum(1), score)
    if solver == "l2":
        return _largest(score.clamp(min=0).square().sum(1), score)
    if solver == "exact":
        return _exact(score)
    return _greedy(score)


def _largest(energy: Tensor, score: Tensor) -> Tensor:
    """The 4 columns of largest energy; padding columns lose against every real one."""
    energy = energy.masked_fill(score[:, 0] < 0, -1)
    order = energy.argsort(dim=1, descending=True, stable=True)  # stable: the lowest index wins a tie
    return order[:, :COLUMNS_PER_BLOCK].sort(dim=1).values


def _exact(score: Tensor) -> Tensor:
    """Try all C(M, 4) choices; ties go to the first in lexicographic order."""
    import torch

    choices = torch.tensor(list(combinations(range(score.shape[2]), COLUMNS_PER_BLOCK)), device=score.device)
    best, best_value = choices[:1].expand(len(score), -1).clone(), _retained(score, choices[0])
    for choice in choices[1:]:
        value = _retained(score, choice)
        better = value > best_value
        best[better], best_value = choice, value.where(better, best_value)
    return best


def _retained(score: Tensor, choice: Tensor) -> Tensor:
    return score[:, :, choice].topk(2, dim=2).values.sum((1, 2))


def _greedy(score: Tensor) -> Tensor:
    """Four greedy picks, then the best single swap until none helps.

    The retained score is monotone submodular in the set of columns, so greedy is at least (1 - 1/e) of the best;
    with the swaps it is within 1e-4 on real weights.
    """
    import torch

    blocks, _, columns = score.shape
    per_column = score.transpose(1, 2).contiguous()  # (blocks, M, V): a column is read as one run
    chosen = torch.zeros(blocks, columns, dtype=torch.bool, device=score.device)
    first, second = score.new_zeros(2, blocks, score.shape[1]).unbind()
    padding = score[:, 0] < 0
    for _ in range(COLUMNS_PER_BLOCK):
        # A new column adds what its score exceeds the row's second best by: max(s, second) - second.
        gain = (torch.maximum(per_column, second[:, None]) - second[:, None]).sum(2)
        gain = gain.masked_fill(padding, -1).masked_fill(chosen, -2)
        pick = gain.max(1).indices  # max() returns the lowest index of equal values on CPU
        chosen[torch.arange(blocks), pick] = True
        values = per_column[torch.arange(blocks), pick].clamp(min=0)
        first, second = torch.maximum(first, values), torch.maximum(second, torch.minimum(first, values))
    if columns > COLUMNS_PER_BLOCK:
        _swap(per_column, chosen, padding)
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :COLUMNS_PER_BLOCK].sort(dim=1).values


def _swap(per_column: Tensor, chosen: Tensor, padding: Tensor) -> None:
    """Improve `chosen` (blocks, M) in place by best single swaps; at most as many rounds as columns."""
    import torch

    live = torch.arange(len(chosen), device=chosen.device)
    for _ in range(chosen.shape[1]):
        score, inside = per_column[live], chosen[live]
        members = inside.int().argsort(dim=1, descending=True, stable=True)[:, :COLUMNS_PER_BLOCK]
        rows = torch.arange(len(live), device=chosen.device)[:, None]
        kept = score[rows, members].clamp(min=0)  # (live, 4, V)
        base = kept.topk(2, dim=1).values.sum((1, 2))
        best = base * (1 + 1e-6)  # a swap must gain more than rounding, or the loop could cycle
        leave, enter = torch.full_like(live, -1), torch.zeros_like(live)
        for out in range(COLUMNS_PER_BLOCK):
            others = torch.cat([kept[:, :out], kept[:, out + 1 :]], 1).topk(2, dim=1).values  # (live, 2, V)
            value = others.sum((1, 2))[:, None] + (torch.maximum(score, others[:, 1:]) - others[:, 1:]).sum(
                2
            )  # (live, M): the retained score with `out` replaced by each column
            value = value.masked_fill(inside | padding[live], -1)
            top, column = value.max(1)
            better = top > best
            best = top.where(better, best)
            leave, enter = members[:, out].where(better, leave), column.where(better, enter)
        improved = leave >= 0
        if not improved.any():
            return
        live, leave, enter = live[improved], leave[improved], enter[improved]
        chosen[live, leave] = False
        chosen[live, enter] = True
