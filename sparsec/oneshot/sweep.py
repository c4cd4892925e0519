"""SparseGPT's sweep: prune a layer group by group, each time moving the error to the columns still to come.

Minimises tr((W - Q) H (W - Q)^T) over Q in the pattern, greedily from left to right (SparseGPT, arXiv 2301.00774).
With H = F F^T, F upper triangular, the cost is a sum over columns j of F_jj^2 (t_j - q_j)^2, where t_j is w_j plus the
errors of earlier columns times column j of F / F_jj: one Cholesky factor is all that is needed, no inverse. Different
from the paper's code: a group is decided at once, by trying every set (`groups`), and so are V:N:M's shared columns.

1. Groups never straddle a block, whatever M is; the tail is a smaller group.
2. Groups of large input energy come first: what they lose can be made up for by all others.
3. A strip is a layer of V rows by itself: the columns that it drops go first, all at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec import columns as column_choice
from sparsec.grouping import largest
from sparsec.oneshot import groups
from sparsec.pattern import NM, VNM, Strip

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128  # columns whose feedback from earlier blocks is one product


def sweep(weight: Tensor, hessian: Tensor, pattern: NM | VNM) -> tuple[Tensor, Tensor]:
    """The pruned weight (rows, cols) and its mask. `weight`: float32, what is approximated; `hessian`: damped."""
    import torch

    cols, m = len(hessian), pattern.m
    whole = cols // m
    energy = hessian.diagonal()[: whole * m].view(whole, m).sum(1)
    first = energy.argsort(descending=True, stable=True)  # rule 2
    order = (first[:, None] * m + torch.arange(m)).flatten()
    order = torch.cat([order, torch.arange(whole * m, cols)])
    ordered = hessian.index_select(0, order).index_select(1, order)
    kept, mask = _sweep(weight.index_select(1, order).T.contiguous(), ordered, pattern)
    back = order.argsort()
    return kept.T.contiguous().index_select(1, back), mask.T.contiguous().index_select(1, back)


def _sweep(weight: Tensor, hessian: Tensor, pattern: NM | VNM) -> tuple[Tensor, Tensor]:
    """All is transposed here, (cols, rows): a column is one run of memory."""
    import torch

    cols, m = len(hessian), pattern.m
    factor = upper_factor(hessian)
    unit = factor / factor.diagonal()
    error, kept = torch.zeros_like(weight), torch.zeros_like(weight)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    block = max(m, _BLOCK // m * m)  # rule 1
    for start in range(0, cols, block):
        end = min(start + block, cols)
        base = torch.addmm(weight[start:end], unit[:start, start:end].T, error[:start])
        chooser = _Chooser(factor, pattern, start, end)
        for a in range(start, end, m):
            b = min(a + m, end)
            moved = base[a - start : b - start]
            if a > start:
                moved = torch.addmm(moved, unit[start:a, a:b].T, error[start:a])
            own = weight[a:b]
            best = own + torch.linalg.solve_triangular(unit[a:b, a:b].T, moved - own, upper=False, unitriangular=True)
            kept[a:b], mask[a:b] = chooser.choose(best, a)
            error[a:b] = own - kept[a:b]
    return kept, mask


def upper_factor(hessian: Tensor) -> Tensor:
    """F upper triangular with F F^T = hessian; raises torch.linalg.LinAlgError where it is not positive definite."""
    import torch

    factor: Tensor = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return factor


class _Chooser:
    """Decides groups of one block; what depends on the Hessian only is prepared for all its whole groups at once."""

    def __init__(self, factor: Tensor, pattern: NM | VNM, start: int, end: int) -> None:
        self.pattern, self.factor, self.start = pattern, factor, start
        self.kept = pattern.n
        m = pattern.m
        blocks = [factor[a : a + m, a : a + m] for a in range(start, end - m + 1, m)]
        self.hessians = _squares(blocks)
        sets = groups.sets_of(m, self.kept)
        self.tried = sets is not None and (isinstance(pattern, NM) or m <= 4 or groups.pairs_in_quads(m) is not None)
        self.values = groups.best_values(self.hessians, sets) if self.tried and sets is not None and blocks else None

    def choose(self, best: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Kept values and mask, both (columns of the group, rows); `best`: y of `groups`, `column`: where it starts."""
        import torch

        m, rows = best.shape
        place = (column - self.start) // self.pattern.m
        if m == self.pattern.m:
            hessian, values = self.hessians[place], self.values[place] if self.values is not None else None
        else:
            hessian = _squares([self.factor[column : column + m, column : column + m]])[0]
            sets = groups.sets_of(m, self.kept)
            values = groups.best_values(hessian[None], sets)[0] if sets is not None else None
        sets = groups.sets_of(m, self.kept)
        if values is None or sets is None:
            return self._ranked(best, hessian)
        candidates = (values.flatten(0, 1) @ best).view(len(sets), m, rows)
        gain = (candidates * (hessian @ best)).sum(1)
        if isinstance(self.pattern, VNM) and m > column_choice.COLUMNS_PER_BLOCK:
            chosen = groups.choose_pair_sets(gain, m, self.pattern.v)
        else:
            chosen = gain.max(0).indices
        kept = candidates.gather(0, chosen.expand(1, m, rows))[0]
        mask = torch.zeros(m, rows, dtype=torch.bool).scatter_(0, sets[chosen].T, True)
        return kept.where(mask, 0.0), mask

    def _ranked(self, best: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Where there are too many sets: weights ranked by what dropping each alone costs."""
        import torch

        m, rows = best.shape
        score = best.square() / torch.linalg.inv(hessian).diagonal()[:, None]
        chosen = ranked(score.T, self.pattern)
        inside = hessian[chosen[:, :, None], chosen[:, None, :]]
        target = (hessian @ best).T.gather(1, chosen)
        values = torch.linalg.solve(inside, target[..., None])[..., 0]
        kept = torch.zeros_like(best).scatter_(0, chosen.T, values.T)
        return kept, torch.zeros(m, rows, dtype=torch.bool).scatter_(0, chosen.T, True)


def ranked(score: Tensor, pattern: NM | VNM) -> Tensor:
    """Columns kept of one group, (rows, kept) int64 ascending, by the scores (rows, columns of the group)."""
    import torch

    rows, m = score.shape
    if isinstance(pattern, NM) or m <= column_choice.COLUMNS_PER_BLOCK:
        return largest(score[:, None], min(pattern.n, m))[:, 0].long()
    strips = torch.nn.functional.pad(score, (0, 0, 0, -rows % pattern.v)).view(-1, pattern.v, m)
    shared = column_choice.choose(strips, "greedy").repeat_interleave(pattern.v, dim=0)[:rows]
    return shared.gather(1, largest(score.gather(1, shared)[:, None], pattern.n)[:, 0].long())


def _squares(factors: list[Tensor]) -> Tensor:
    import torch

    if not factors:
        return torch.zeros(0)
    stacked = torch.stack(factors)
    return stacked @ stacked.transpose(1, 2)


def sweep_strips(weight: Tensor, hessian: Tensor, pattern: Strip, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rule 3. `columns`: (strips, groups, 4), what each strip keeps, in the form of `strips.canonical`."""
    import torch

    kept, mask = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    inner = NM(2, column_choice.COLUMNS_PER_BLOCK)
    for strip, rows in enumerate(range(0, len(weight), pattern.v)):
        order = columns[strip].flatten().long()
        order = order[torch.cat([order.new_ones(1), order.diff()]) != 0]  # spare slots repeat the last column
        part, inside = weight[rows : rows + pattern.v], hessian[order][:, order]
        target = torch.linalg.solve(inside, hessian[order] @ part.T)  # the dropped columns' share, made up for
        found, chosen = _sweep(target, inside, inner)
        kept[rows : rows + pattern.v, order] = found.T
        mask[rows : rows + pattern.v, order] = chosen.T
    return kept, mask
