"""Which rows share a strip: a balanced assignment of rows to the strips of a V:N:M@strip pattern.

1. The columns of every strip are chosen for the rows that are in it (`strips.strip_columns`); then each row goes where
   the columns suit it best, V rows a strip, by linear assignment ("Beyond 2:4", arXiv 2410.16135). Both steps repeat.
2. It starts from the rows as they are, or as windows of M columns would assign them, whichever keeps more; random
   numbers, fewer each time, keep it from ending where it began. The best assignment seen is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec.pattern import VNM, Strip
from sparsec.permuting.objective import Grid, largest
from sparsec.permuting.search import Freedom, Role, search
from sparsec.strips import strip_columns

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_NOISE = (0.3, 0.1, 0.0)  # of each repetition, in standard deviations of the table
_SWEEPS = 3  # of the search with windows


def assign_rows(score: Tensor, pattern: Strip, seed: int = 0) -> Tensor:
    """The rows of strip after strip, (rows,) int64: place i, in strip i // V, is for row `result[i]`; ascending there.

    score: (rows, cols) finite, not negative. As `Strip.select` takes it. Never keeps less than the rows as they are.
    """
    import numpy as np
    import torch

    score, rng, rows = score.detach().float().cpu(), np.random.default_rng(seed), torch.arange(len(score))
    if len(rows) <= pattern.v:
        return rows
    starts = [rows, _by_windows(score, VNM(pattern.v, pattern.n, pattern.m), seed)]
    best, order, columns = max((_kept(score, pattern, start) for start in starts), key=lambda found: found[0])
    found = order
    for noise in _NOISE:
        order = _reassigned(score, pattern, columns, noise, rng)
        kept, order, columns = _kept(score, pattern, order)
        if kept > best:
            best, found = kept, order
    return torch.cat([strip.sort().values for strip in found.split(pattern.v)])


def _by_windows(score: Tensor, pattern: VNM, seed: int) -> Tensor:
    import torch

    rows = torch.arange(len(score))
    freedom = Freedom("rows", 1, len(rows), (Role(0, "rows", {0: rows[:, None]}),))
    for step in search([Grid.of(score, pattern)], [freedom], 1, seed, most=_SWEEPS):
        rows = rows[step.order[0]]
    return rows


def _kept(score: Tensor, pattern: Strip, order: Tensor) -> tuple[float, Tensor, Tensor]:
    """What strips of this order keep after a short search of their columns, the order, and the columns."""
    columns = strip_columns(score[order], pattern.v, pattern.m, rounds=1).long()
    by_row = columns.repeat_interleave(pattern.v, 0)[: len(order)]
    slots = score[order].gather(1, by_row.flatten(1)).view(by_row.shape)
    slots[:, -1, pattern.real_slots(score.shape[1]) :] = 0
    return float(largest(slots, pattern.n, 2).sum((1, 2)).double().sum()), order, columns


def _reassigned(score: Tensor, pattern: Strip, columns: Tensor, noise: float, rng: np.random.Generator) -> Tensor:
    """Rows in the order of the strips that suit them best, with some noise on how well they do."""
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment

    real = pattern.real_slots(score.shape[1])
    worth = []
    for strip in columns:
        slots = score[:, strip.flatten()].unflatten(1, strip.shape)
        slots[:, -1, real:] = 0
        worth.append(largest(slots, pattern.n, 2).sum((1, 2)))
    table = torch.stack(worth, 1).double().numpy()
    centred = table - table.mean(0) - table.mean(1, keepdims=True)
    table = table + noise * centred.std() * rng.gumbel(size=table.shape)
    places = np.repeat(table, pattern.v, axis=1)[:, : len(table)]
    order = torch.empty(len(table), dtype=torch.int64)
    row, place = linear_sum_assignment(places, maximize=True)
    order[torch.from_numpy(place)] = torch.from_numpy(row)
    return order
