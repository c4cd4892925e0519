"""The best weights to keep in one group of columns, found by trying every set: N of M, and V:N:M's shared columns.

A group is seen through y, the weights that would be best if all stayed, and A, the Hessian of what leaving some of them
out costs when the others make up for it. Keeping the set S, the best values are q = y_S + A_SS^-1 A_SP y_P (P: the
rest), and the cost falls by y A q^T below that of keeping none (Optimal Brain Surgeon, Hassibi and Stork 1993).
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_SETS = 130  # C(16, 2) = 120 is tried out; more sets are ranked weight by weight
MOST_QUADS = 1820  # C(16, 4)


@cache
def sets_of(columns: int, kept: int) -> Tensor | None:
    """Every way to keep `kept` of `columns`, (sets, kept) int64 ascending; None where there are too many to try."""
    import torch

    kept = min(kept, columns)
    if comb(columns, kept) > MOST_SETS:
        return None
    return torch.tensor(list(combinations(range(columns), kept)))


@cache
def pairs_in_quads(columns: int) -> tuple[Tensor, Tensor] | None:
    """Every choice of 4 columns, (choices, 4), and the 6 pairs inside each as numbers in `sets_of(columns, 2)`."""
    import torch

    if comb(columns, 4) > MOST_QUADS or comb(columns, 2) > MOST_SETS:
        return None
    number = {pair: i for i, pair in enumerate(combinations(range(columns), 2))}
    quads = list(combinations(range(columns), 4))
    pairs = [[number[pair] for pair in combinations(quad, 2)] for quad in quads]
    return torch.tensor(quads), torch.tensor(pairs)


def inverses(hessian: Tensor, sets: Tensor) -> Tensor:
    """(A_SS)^-1 of every set, (groups, sets, kept, kept); `hessian`: A, (groups, M, M)."""
    import torch

    inverse: Tensor = torch.linalg.inv(hessian[:, sets[:, :, None], sets[:, None, :]])
    return inverse


def kept_values(hessian: Tensor, sets: Tensor) -> Tensor:
    """Matrices (groups, sets, kept, M) that give the kept values of every set from y; `hessian`: A, (groups, M, M)."""
    import torch

    found: Tensor = torch.linalg.solve(hessian[:, sets[:, :, None], sets[:, None, :]], hessian[:, sets])
    return found


def best_values(hessian: Tensor, sets: Tensor) -> Tensor:
    """Matrices B (groups, sets, M, M) with q = B y, the best values on each set; `hessian`: A, (groups, M, M)."""
    groups, m, _ = hessian.shape
    count, kept = sets.shape
    values = kept_values(hessian, sets)
    place = sets[None, :, :, None].expand(groups, count, kept, m)
    return hessian.new_zeros(groups, count, m, m).scatter_(2, place, values)


def choose_pair_sets(gain: Tensor, columns: int, height: int) -> Tensor:
    """For each row the pair of largest gain among the 4 columns that its strip of `height` rows shares: (rows,) int64.

    `gain`: (pairs, rows), in the order of `sets_of(columns, 2)`. The 4 columns keep the most over the whole strip.
    """
    import torch

    known = pairs_in_quads(columns)
    assert known is not None
    _, pairs = known
    rows = gain.shape[1]
    best = gain[pairs[:, 0]]
    for k in range(1, pairs.shape[1]):
        best = torch.maximum(best, gain[pairs[:, k]])
    missing = -rows % height
    strips = torch.nn.functional.pad(best, (0, missing)).view(len(pairs), -1, height).sum(2)
    allowed = pairs[strips.max(0).indices].repeat_interleave(height, dim=0)[:rows].T  # (6, rows)
    return allowed.gather(0, gain.gather(0, allowed).max(0).indices[None])[0]
