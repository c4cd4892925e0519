"""Find the groups of four that the zeros of an already pruned strip show, so that pruning it again changes nothing.

In a pruned strip every row keeps 2 of the 4 columns of each group. With +1 for kept and -1 for not, the four columns of
a group then add up to 0 in every row. So it is 4-SUM: give each row a random number mod 2^64 and each column the signed
sum of them; four columns belong together where their sums add up to 0, which sorting the sums of all pairs finds. With
32 rows or more hardly any other four columns do so. Where too many do, as in strips of few rows, nothing is found, and
the search of `strips` takes over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec.columns import COLUMNS_PER_BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_MOST_UNUSED = 4  # columns of groups that no row keeps: they look alike, and more would match each other
_MOST_MATCHES = 64  # of pairs, for each column; more mean that four columns of zero sum are nothing special here


def groups_of(score: Tensor, groups: int) -> Tensor | None:
    """The columns of each group, (groups, 4) int64, if the nonzeros of `score`, (rows, cols), show them; or None.

    Rows of zeros only are passed over. Deterministic.
    """
    import numpy as np
    import torch

    counts = (score > 0).sum(1)
    if bool(((counts != 2 * groups) & (counts > 0)).any()) or not bool(counts.any()):
        return None
    kept = (score[counts > 0] > 0).numpy()
    used, unused = np.flatnonzero(kept.any(0)), np.flatnonzero(~kept.any(0))
    missing = COLUMNS_PER_BLOCK * groups - len(used)
    if not 0 <= missing <= min(len(unused), _MOST_UNUSED):
        return None
    columns = np.sort(np.concatenate([used, unused[:missing]]))
    found = _disjoint(_fours(kept[:, columns]), len(columns))
    if found is None or (kept[:, columns[found]].sum(2) != 2).any():
        return None
    return torch.from_numpy(columns[found])


def _fours(kept: Any) -> Any:
    """All fours of columns of zero sum, (fours, 4) ascending, in lexicographic order; none where there are too many."""
    import numpy as np

    rows, columns = kept.shape
    weights = np.random.default_rng(0).integers(0, 2**64, rows, dtype=np.uint64)
    sums = np.where(kept, np.uint64(1), ~np.uint64(0)).T @ weights  # ~0 is -1 mod 2^64
    first, second = np.triu_indices(columns, 1)
    pairs = sums[first] + sums[second]
    order = np.argsort(pairs)
    pairs = pairs[order]
    asked = np.searchsorted(pairs, np.uint64(1 << 63))  # of a sum and its negative, one is in the lower half
    wanted = (-pairs[:asked])[::-1]  # ascending: a search finds them in its cache
    start, end = (np.searchsorted(pairs, wanted, side)[::-1] for side in ("left", "right"))
    matches = end - start
    if matches.sum() > _MOST_MATCHES * columns:
        return np.empty((0, COLUMNS_PER_BLOCK), dtype=np.int64)
    one = order[np.repeat(np.arange(asked), matches)]
    other = order[np.arange(len(one)) - np.repeat(matches.cumsum() - matches, matches) + np.repeat(start, matches)]
    fours = np.sort(np.stack([first[one], second[one], first[other], second[other]], 1), axis=1)
    return np.unique(fours[(np.diff(fours, axis=1) > 0).all(1)], axis=0)


def _disjoint(fours: Any, columns: int) -> Any:
    """Fours that hold every column once, or None where none are found.

    The column that is in the fewest fours chooses next, so that what is certain decides what is not.
    """
    import numpy as np

    taken: list[Any] = []
    while len(taken) * COLUMNS_PER_BLOCK < columns:
        counts = np.bincount(fours.ravel(), minlength=columns)
        counts[np.ravel(taken).astype(int)] = len(fours) + 1
        column = counts.argmin()
        if not counts[column]:
            return None
        four = fours[(fours == column).any(1).argmax()]
        taken.append(four)
        fours = fours[~np.isin(fours, four).any(1)]
    return np.stack(taken)
