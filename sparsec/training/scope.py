"""Global scope: all unstructured sites share one budget, so that a site of small scores keeps less than others.

1. Kept are the largest scores of all sites together; of equal ones those of earlier sites, and there the first.
2. No site is emptied and none stays dense: each keeps and loses at least one weight of every matrix.
3. A site of several matrices (stacked q, k and v) keeps as many in each; what does not divide is left out.
4. Other patterns keep a fixed number in every group, whatever the scope.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsec.pattern import Pattern, Unstructured
from sparsec.selection import Selection
from sparsec.training.parts import Criterion, Tracked

_BITS = 16  # of a score that one count tells apart


def shares(sites: Sequence[Tracked], asked: Mapping[str, Pattern | None], by: Criterion) -> dict[str, Pattern]:
    """The pattern of each unstructured site, where all together keep what those of `asked` do."""
    pool, scores, keep = [], [], 0
    for one in sites:
        if isinstance(pattern := asked[one.site.name], Unstructured):
            batch, rows, cols = one.site.shape
            keep += batch * pattern.kept(rows, cols)
            pool.append(one)
            scores.append(by.score(one, one.parameter.detach()).float().contiguous())
    if not keep:
        return {}
    least = nth_largest(scores, keep)
    above = [int((score > least).sum()) for score in scores]
    room, found = keep - sum(above), dict[str, Pattern]()
    for one, score, count in zip(pool, scores, above, strict=True):
        equal = min(room, int((score == least).sum()))  # rule 1
        room -= equal
        batch, rows, cols = one.site.shape
        found[one.site.name] = keeping(min(max((count + equal) // batch, 1), rows * cols - 1), rows * cols)
    return found


def nth_largest(scores: Sequence[Tensor], n: int) -> float:
    """The n-th largest of float32 values, none negative, of all tensors: two counts, nothing is sorted or joined."""
    prefix, left = 0, n
    for shift in (_BITS, 0):
        counts = torch.zeros(1 << _BITS, dtype=torch.int64)
        for score in scores:
            bits = score.view(torch.int32).flatten()  # of such values the order is that of their bits
            if shift == 0:
                bits = bits[bits >> _BITS == prefix]
            counts += torch.bincount(bits >> shift & (1 << _BITS) - 1, minlength=1 << _BITS).cpu()
        from_top = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, left))
        left -= int(from_top[place - 1]) if place else 0
        prefix = prefix << _BITS | (1 << _BITS) - 1 - place
    return float(torch.tensor(prefix, dtype=torch.int32).view(torch.float32))


def keeping(kept: int, of: int) -> Unstructured:
    """The pattern, of four digits or as many as it takes, that keeps so many weights of a matrix.

    >>> str(keeping(67, 240))
    'unstructured:0.7208'
    """
    for digits in range(4, 17):
        sparsity = round(1 - kept / of, digits)
        if 0 < sparsity < 1 and Unstructured(sparsity).kept(1, of) == kept:
            return Unstructured(sparsity)
    return Unstructured(1 - kept / of)


def chosen(selection: Selection) -> Unstructured:
    """The pattern that a selection of an unstructured site fills."""
    matrix = selection.positions[0]
    return keeping(int(matrix.count_nonzero()), matrix.numel())
