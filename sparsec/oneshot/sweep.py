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

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from sparsec import columns as column_choice
from sparsec.grouping import largest
from sparsec.oneshot import groups, native
from sparsec.pattern import NM, VNM, Strip

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 128  # columns whose feedback from earlier blocks is one product
_FACTORED = 256  # columns of the factor that are computed at once


def sweep(parts: Sequence[Tensor], gram: Tensor, ridge: float, pattern: NM | VNM) -> Tensor:
    """The pruned weight (rows, cols), 0 where nothing is kept. `parts`: float32, one below another.

    H is gram + ridge I. The factor takes the place of gram's upper triangle, as a second matrix of this size would be
    the most that is held at any time; in the end gram is what it was. The weight is turned into a copy, in which what
    it loses takes its place. Raises torch.linalg.LinAlgError where H is not positive definite.
    """
    import torch

    cols, m = len(gram), pattern.m
    whole = cols // m
    energy = gram.diagonal()[: whole * m].view(whole, m).sum(1)
    first = energy.argsort(descending=True, stable=True)  # rule 2
    order = (first[:, None] * m + torch.arange(m)).flatten()
    order = torch.cat([order, torch.arange(whole * m, cols)])
    _reorder_(gram, order)
    corners = [gram[start:end, start:end].clone() for start, end in _blocks(cols)]
    gram.diagonal().add_(ridge)
    parts = [part.contiguous() for part in parts]  # already so, but for layers whose weight is stored transposed
    lost = _turned(parts, order)
    try:
        _sweep(lost, gram, pattern)
    finally:
        for (start, end), corner in zip(_blocks(cols), corners, strict=True):
            gram[start:end, start:end] = corner
            gram[:start, start:end] = gram[start:end, :start].T
        _reorder_(gram, order.argsort())
    return _kept(parts, order, lost)


def _turned(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """Columns of all parts in an order, (cols, rows)."""
    import torch

    if native.available(*parts):
        return native.turned(parts, order)
    found = torch.empty(len(order), sum(map(len, parts)))
    for own, which in zip(found.split(_BLOCK), order.split(_BLOCK), strict=True):
        torch.cat([part.index_select(1, which).T for part in parts], 1, out=own)
    return found


def _kept(parts: Sequence[Tensor], order: Tensor, lost: Tensor) -> Tensor:
    """The parts less what they lost, (rows, cols): exactly 0 where that is all."""
    import torch

    if native.available(*parts):
        return native.kept(parts, order, lost)
    found = torch.cat(tuple(parts)) if len(parts) > 1 else parts[0].clone()
    for own, which in zip(lost.split(_BLOCK), order.split(_BLOCK), strict=True):
        found.index_add_(1, which, own.T, alpha=-1)
    return found


def _reorder_(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a square matrix in another order, without a second one."""
    for part in matrix.split(_FACTORED, 1):
        part.copy_(part.index_select(0, order))
    for part in matrix.split(_FACTORED):
        part.copy_(part.index_select(1, order))


def _blocks(cols: int) -> list[tuple[int, int]]:
    """Of `upper_factor_`, the last one first."""
    return [(max(0, end - _FACTORED), end) for end in range(cols, 0, -_FACTORED)]


def _sweep(lost: Tensor, hessian: Tensor, pattern: NM | VNM) -> None:
    """Prune a weight, `lost` (cols, rows), which becomes what it loses; `hessian` becomes F.

    All is transposed here: a column is one run of memory.
    """
    import torch

    cols, m = len(hessian), pattern.m
    factor = upper_factor_(hessian)
    block = max(m, _BLOCK // m * m)  # rule 1
    for start in range(0, cols, block):
        end = min(start + block, cols)
        unit = factor[:end, start:end] / factor.diagonal()[start:end]
        fed = unit[:start].T @ lost[:start]
        chooser, done = _Chooser(factor, pattern, start, end), start
        if chooser.compiled is not None:
            done = end - (end - start) % m
            width = done - start
            native.sweep_block(chooser.compiled, lost[start:done], fed[:width], unit[start:done, :width].contiguous())
        for a in range(done, end, m):
            b = min(a + m, end)
            own, moved = lost[a:b], fed[a - start : b - start]
            if a > start:
                moved = torch.addmm(moved, unit[start:a, a - start : b - start].T, lost[start:a])
            own -= chooser.choose(torch.addmm(own, chooser.undo(a), moved), a)


def upper_factor_(hessian: Tensor) -> Tensor:
    """F upper triangular with F F^T = hessian, in its place; what is below the diagonal blocks stays as it is.

    By blocks from the last column on, which is twice as fast as torch's factor of the reversed matrix. Raises
    torch.linalg.LinAlgError where it is not positive definite.
    """
    import torch

    for start, end in (blocks := _blocks(len(hessian))):
        corner = torch.linalg.cholesky(hessian[start:end, start:end].flip(0, 1)).flip(0, 1)
        hessian[start:end, start:end] = corner
        if start:
            side = torch.linalg.solve_triangular(corner.T, hessian[:start, start:end], upper=False, left=False)
            hessian[:start, start:end] = side
        for left, right in (block for block in blocks if block[1] <= start):
            hessian[:right, left:right].addmm_(side[:right], side[left:right].T, alpha=-1)
    return hessian


class _Chooser:
    """Decides groups of one block; what depends on the Hessian only is prepared for all its whole groups at once."""

    def __init__(self, factor: Tensor, pattern: NM | VNM, start: int, end: int) -> None:
        self.pattern, self.factor, self.start, self.end = pattern, factor, start, end
        m = pattern.m
        columns = range(start, end - m + 1, m)
        self.parts = _stacked([factor[a : a + m, a : a + m] for a in columns])
        sets = groups.sets_of(m, pattern.n)
        shared = isinstance(pattern, VNM) and m > column_choice.COLUMNS_PER_BLOCK
        tried = sets is not None and not (shared and groups.pairs_in_quads(m) is None)
        self.sets = sets if tried and len(columns) else None
        self.shared = shared
        self.undone = _undo(self.parts) if len(columns) else None

    @cached_property
    def table(self) -> Tensor | None:
        """`_table` of all whole groups; None where weights are ranked."""
        return None if self.sets is None else _table(self.parts, self.sets)

    @cached_property
    def compiled(self) -> native.Groups | None:
        """The whole groups for the compiled sweep; None where it is not there, or not for them."""
        import torch

        m, sets, pattern = self.pattern.m, self.sets, self.pattern
        if sets is None or self.undone is None or sets.shape[1] > native.MOST_KEPT or not native.available(self.parts):
            return None
        hessians = self.parts @ self.parts.transpose(1, 2)
        quads = groups.pairs_in_quads(m) if self.shared else None
        return native.Groups(
            m,
            sets.to(torch.int32),
            None if quads is None else quads[1].to(torch.int32),
            pattern.v if isinstance(pattern, VNM) else 1,
            self.undone.contiguous(),
            hessians,
            groups.kept_values(hessians, sets).contiguous(),
            None if quads is None else groups.inverses(hessians, sets).contiguous(),
        )

    def undo(self, column: int) -> Tensor:
        """The inverse of the group's own feedback, (m, m): what takes moved weights to the best ones."""
        width = min(self.pattern.m, self.end - column)
        if width == self.pattern.m and self.undone is not None:
            return self.undone[(column - self.start) // width]
        return _undo(self.factor[None, column : column + width, column : column + width])[0]

    def choose(self, best: Tensor, column: int) -> Tensor:
        """Kept values (columns of the group, rows), elsewhere 0; `best`: y of `groups`, `column`: where it starts."""
        m, rows = best.shape
        part = self.factor[column : column + m, column : column + m]
        sets = groups.sets_of(m, self.pattern.n)
        table = None
        if m == self.pattern.m:
            table = None if self.table is None else self.table[(column - self.start) // m]
        elif sets is not None:
            table = _table(part.triu()[None], sets)[0]
        if table is None or sets is None:
            part = part.triu()
            return self._ranked(best, part @ part.T)
        products = (table @ best).view(len(sets) + 1, m, rows)
        candidates = products[1:]
        gain = candidates[:, 0] * products[0, 0]
        for i in range(1, m):
            gain.addcmul_(candidates[:, i], products[0, i])
        if isinstance(self.pattern, VNM) and m > column_choice.COLUMNS_PER_BLOCK:
            chosen = groups.choose_pair_sets(gain, m, self.pattern.v)
        else:
            chosen = gain.max(0).indices
        return candidates.gather(0, chosen.expand(1, m, rows))[0]  # outside its set a candidate is exactly 0

    def _ranked(self, best: Tensor, hessian: Tensor) -> Tensor:
        """Where there are too many sets: weights ranked by what dropping each alone costs."""
        import torch

        score = best.square() / torch.linalg.inv(hessian).diagonal()[:, None]
        chosen = ranked(score.T, self.pattern)
        inside = hessian[chosen[:, :, None], chosen[:, None, :]]
        target = (hessian @ best).T.gather(1, chosen)
        values = torch.linalg.solve(inside, target[..., None])[..., 0]
        return torch.zeros_like(best).scatter_(0, chosen.T, values.T)


def ranked(score: Tensor, pattern: NM | VNM) -> Tensor:
    """Columns kept of one group, (rows, kept) int64 ascending, by the scores (rows, columns of the group)."""
    import torch

    rows, m = score.shape
    if isinstance(pattern, NM) or m <= column_choice.COLUMNS_PER_BLOCK:
        return largest(score[:, None], min(pattern.n, m))[:, 0].long()
    strips = torch.nn.functional.pad(score, (0, 0, 0, -rows % pattern.v)).view(-1, pattern.v, m)
    shared = column_choice.choose(strips, "greedy").repeat_interleave(pattern.v, dim=0)[:rows]
    return shared.gather(1, largest(score.gather(1, shared)[:, None], pattern.n)[:, 0].long())


def _stacked(parts: list[Tensor]) -> Tensor:
    """Parts of the factor; a group that lies across two blocks of `upper_factor_` has garbage below its diagonal."""
    import torch

    return torch.stack(parts).triu() if parts else torch.empty(0)


def _table(parts: Tensor, sets: Tensor) -> Tensor:
    """For each group A, then the matrices B of all its sets: (groups, (sets + 1) * m, m). `parts`: of the factor."""
    import torch

    hessians = parts @ parts.transpose(1, 2)
    return torch.cat([hessians[:, None], groups.best_values(hessians, sets)], 1).flatten(1, 2)


def _undo(parts: Tensor) -> Tensor:
    """(N^T)^-1 of each group, N its part of the factor with a unit diagonal."""
    import torch

    unit = (parts / parts.diagonal(dim1=1, dim2=2)[:, None]).transpose(1, 2)
    own = torch.eye(parts.shape[1]).expand_as(unit)
    inverse: Tensor = torch.linalg.solve_triangular(unit, own, upper=False, unitriangular=True)
    return inverse


def sweep_strips(weight: Tensor, hessian: Tensor, pattern: Strip, columns: Tensor) -> Tensor:
    """Rule 3. `columns`: (strips, groups, 4), what each strip keeps, in the form of `strips.canonical`."""
    import torch

    kept, inner = torch.zeros_like(weight), NM(2, column_choice.COLUMNS_PER_BLOCK)
    for strip, rows in enumerate(range(0, len(weight), pattern.v)):
        order = columns[strip].flatten().long()
        order = order[torch.cat([order.new_ones(1), order.diff()]) != 0]  # spare slots repeat the last column
        part, across = weight[rows : rows + pattern.v], hessian.index_select(0, order)
        inside = across.index_select(1, order)
        target = torch.linalg.solve(inside, across @ part.T)  # the dropped columns' share, made up for
        lost = target.clone(memory_format=torch.contiguous_format)
        _sweep(lost, inside, inner)
        kept[rows : rows + pattern.v, order] = (target - lost).T
    return kept
