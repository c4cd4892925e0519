"""Search the permutations that let patterns keep most: one freedom after the other, all matrices it moves at once.

1. Things (channels) whose groups are all different are exchanged by linear assignment: what each place keeps with each
   of them is a table, and the tables of all matrices are added (slot by slot: "Beyond 2:4", arXiv 2410.16135, and RIA,
   ICLR 2024). Every sweep deals the things to such sets at random, so any two of them can meet.
2. Where there is time for many sweeps, the tables get random numbers at first, less and less (simulated annealing):
   that leaves local optima. The best state seen is kept, so nothing is lost.
3. A thing that fills several columns of a group (a head) is exchanged with another if that keeps more.
4. Sweeps are counted by the size of the matrices, not by the clock: the result is the same on every machine, unless a
   deadline cuts the search short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sparsec.columns import COLUMNS_PER_BLOCK
from sparsec.pattern import NM, VNM
from sparsec.permuting.objective import Grid, Grouped

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Side = Literal["rows", "cols"]
_WORK = 3e9  # comparisons that a freedom may take in a round
_A_TABLE = 1e6  # comparisons in whose time the smallest table is made
_CHOSEN = 3  # tables in whose time a small one is made for which columns are chosen too
_CHOICE = 400  # comparisons that choosing columns takes for every score
_LEAST, _MOST = 3, 600  # sweeps of a round
_ANNEALED = 40  # sweeps from which on rule 2 pays: fewer end too hot
_HOT, _COOL, _COLD_SHARE = 0.3, 0.03, 0.15  # noise, in standard deviations of the table; sweeps without any at the end
_PAIRS_A_SWEEP = 7  # of few things there are few pairs to try
_GAIN = 1e-7  # relative: an assignment must gain more than float32 rounds
_TOGETHER = 1024  # rows assigned at once


@dataclass(frozen=True)
class Role:
    """What a freedom moves in one matrix."""

    grid: int
    side: Side
    places: Mapping[int, Tensor]
    """For each of the freedom's contexts that are in the matrix, where its things stand: (size, columns of each)."""


@dataclass(frozen=True)
class Freedom:
    """Things that may be put in any order, separately in each context (such as the channels of each head)."""

    name: str
    contexts: int
    size: int
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Step:
    """One permutation found: what stood at `order[context, i]` stands at i. Steps are applied one after the other."""

    freedom: int
    order: Tensor
    gain: float
    seconds: float


Progress = Callable[[int, int], None]


def search(
    grids: Sequence[Grid],
    freedoms: Sequence[Freedom],
    rounds: int = 2,
    seed: int = 0,
    deadline: float = float("inf"),
    progress: Progress = lambda done, total: None,
    most: int = _MOST,
) -> list[Step]:
    """Permute the grids in place, all freedoms in turn, until a round gains nothing; the steps in the order they came.

    `deadline`: a time of `time.perf_counter` after which nothing new is begun. `most`: sweeps of a freedom in
    a round, at most.
    """
    import numpy as np
    import torch

    steps: list[Step] = []
    for turn in range(rounds):
        gained = 0.0
        for index, freedom in enumerate(freedoms):
            progress(turn * len(freedoms) + index, rounds * len(freedoms))
            start, order = time.perf_counter(), torch.arange(freedom.size).repeat(freedom.contexts, 1)
            gain = 0.0
            for context in range(freedom.contexts):
                one = _One(grids, freedom, context, np.random.default_rng([seed, turn, index, context]), deadline, most)
                gain += one.run()
                order[context] = one.order
            if gain > 0:
                steps.append(Step(index, order, gain, time.perf_counter() - start))
            gained += gain
        if len(freedoms) == 1 or gained <= _GAIN * sum(grid.total for grid in grids):
            break
    progress(rounds * len(freedoms), rounds * len(freedoms))
    return steps


def matrix(score: Tensor, pattern: Grouped, rounds: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Grid]:
    """Permute one matrix (rows, cols) on both sides, free of any graph: the orders of rows and columns, and the grid.

    The permuted matrix is `score[rows][:, cols]`.
    """
    import torch

    grid, orders = Grid.of(score, pattern), {"cols": torch.arange(score.shape[1]), "rows": torch.arange(score.shape[0])}
    sides: list[Side] = ["cols"] if isinstance(pattern, NM) else ["cols", "rows"]
    freedoms = [
        Freedom(side, 1, len(orders[side]), (Role(0, side, {0: torch.arange(len(orders[side]))[:, None]}),))
        for side in sides
    ]
    for step in search([grid], freedoms, rounds, seed):
        side = sides[step.freedom]
        orders[side] = orders[side][step.order[0]]
    return orders["rows"], orders["cols"], grid


class _One:
    """The search of one freedom in one context."""

    def __init__(
        self,
        grids: Sequence[Grid],
        freedom: Freedom,
        context: int,
        rng: np.random.Generator,
        deadline: float,
        most: int,
    ) -> None:
        import torch

        self.order, self.rng, self.deadline, self.most = torch.arange(freedom.size), rng, deadline, most
        self.work = _WORK / freedom.contexts
        self.roles = [
            (grids[role.grid], role.side, role.places[context])
            for role in freedom.roles
            if context in role.places and matters(grids[role.grid], role.side, role.places[context])
        ]
        self.grids = list({id(grid): grid for grid, _, _ in self.roles}.values())

    @property
    def total(self) -> float:
        return sum(grid.total for grid in self.grids)

    def run(self) -> float:
        """Permute; what was gained, never below 0."""
        if not self.roles or len(self.order) < 2 or time.perf_counter() >= self.deadline:
            return 0.0
        start = self.total
        if all(_apart(grid, side, places) for grid, side, places in self.roles) and len(self.grids) == len(self.roles):
            self._assign()
        else:
            self._swap_pairs()
        return self.total - start

    def _assign(self) -> None:
        """Rules 1 and 2."""
        sweeps = self._sweeps()
        hot = int(sweeps * (1 - _COLD_SHARE)) if sweeps >= _ANNEALED else 0
        best, kept = self.total, self.order.clone()
        for sweep in range(sweeps):
            noise = _HOT * (_COOL / _HOT) ** (sweep / hot) if sweep < hot else 0.0
            moved = [self._exchange(things, noise) for things in self._sets()]
            if time.perf_counter() >= self.deadline or not (noise or any(moved)):
                break
            if noise and self.total > best:
                best, kept = self.total, self.order.clone()
        if self.total < best:
            self._restore(kept)

    def _restore(self, order: Tensor) -> None:
        """Go back to an order that was seen."""
        self._move(slice(None), self.order.argsort()[order])

    def _sweeps(self) -> int:
        """Rule 4: by what the tables, and choosing columns again, cost for each sweep."""
        work = 0.0
        for grid, side, places in self.roles:
            strips, cols, height = grid.cells.shape
            shared = isinstance(grid.pattern, VNM)
            calls = _CHOSEN if shared and grid.pattern.m > COLUMNS_PER_BLOCK + 1 else 1
            work += _A_TABLE * (calls * grid.pattern.m if side == "cols" else 1)
            if side == "rows":
                work += (
                    places.numel() * cols * (strips + _CHOICE) + places.numel() * min(_TOGETHER, places.numel()) ** 2
                )
            else:
                tries = min(COLUMNS_PER_BLOCK, grid.pattern.m) if shared else 1
                work += places.numel() ** 2 / grid.pattern.m * strips * height * tries
                work += shared * places.numel() * strips * height * grid.pattern.m * _CHOICE / 2
        return int(min(self.most, max(_LEAST, min(self.work / max(1.0, work), len(self.order) ** 2 / _PAIRS_A_SWEEP))))

    def _sets(self) -> list[Tensor]:
        """Things dealt to sets in which no two meet in a group, nor a thing itself."""
        import torch

        order = self.rng.permutation(len(self.order))
        columns = [(places // grid.pattern.m).tolist() for grid, side, places in self.roles if side == "cols"]
        if not columns:
            return list(torch.from_numpy(order).split(_TOGETHER))
        sets: list[list[int]] = []
        taken: list[list[set[int]]] = []
        for thing in order.tolist():
            mine = [groups[thing] for groups in columns]
            fits = (at for at, used in enumerate(taken) if all(map(set.isdisjoint, used, mine)))
            at = next(fits, len(sets))
            if at == len(sets):
                sets.append([])
                taken.append([set() for _ in columns])
            sets[at].append(thing)
            for there, groups in zip(taken[at], mine, strict=True):
                there.update(groups)
        return [torch.tensor(members) for members in sets if len(members) > 1]

    def _exchange(self, things: Tensor, noise: float) -> bool:
        """Assign the things of a set to their places anew; whether any moved."""
        import torch
        from scipy.optimize import linear_sum_assignment

        tables = [grid.placed(side, column) for grid, side, places in self.roles for column in places[things].unbind(1)]
        table = torch.stack(tables).sum(0).numpy()
        now = table.trace()
        if noise:
            centred = table - table.mean(0) - table.mean(1, keepdims=True)
            table = table + noise * centred.std() * self.rng.gumbel(size=table.shape)
        # Places of a strip are alike: finding things for them takes many times as long as finding places for things.
        picked = linear_sum_assignment(table.T, maximize=True)[1].argsort()
        if not noise and table[range(len(picked)), picked].sum() <= now * (1 + _GAIN):
            return False
        self._move(things, things[torch.from_numpy(picked)])
        return True

    def _move(self, things: Tensor | slice, sources: Tensor) -> None:
        for grid, side, places in self.roles:
            targets = places[things]
            found = places[sources]
            moved = (targets != found).any(1)
            if bool(moved.any()):
                grid.move(side, targets[moved].flatten(), found[moved].flatten())
        self.order[things] = self.order[sources]

    def _swap_pairs(self) -> None:
        """Rule 3."""
        import torch

        first, second = torch.triu_indices(len(self.order), len(self.order), 1)
        tries = int(max(_LEAST, self.work // max(1.0, sum(map(_cost_of_two, self.roles)))))
        for pair in self.rng.permutation(len(first))[:tries]:
            if time.perf_counter() >= self.deadline:
                return
            things, before = torch.stack([first[pair], second[pair]]), self.total
            self._move(things, things.flip(0))
            if self.total <= before * (1 + _GAIN):
                self._move(things, things.flip(0))


def _cost_of_two(role: tuple[Grid, Side, Tensor]) -> float:
    """Comparisons of exchanging two things, and of taking it back."""
    grid, side, places = role
    strips, cols, height = grid.cells.shape
    share = _CHOICE if isinstance(grid.pattern, VNM) else grid.pattern.m
    if side == "rows":
        return 4.0 * cols * height * share * max(1, places.shape[1] // height)
    return 4.0 * strips * height * share * max(grid.pattern.m, places.shape[1])


def matters(grid: Grid, side: Side, places: Tensor) -> bool:
    """Whether any order of these things keeps something else than another."""
    if side == "rows":
        return isinstance(grid.pattern, VNM) and len((places // grid.height).unique()) > 1
    return len((places // grid.pattern.m).unique()) > 1


def _apart(grid: Grid, side: Side, places: Tensor) -> bool:
    """Whether the columns of each thing are in different groups, so that what they keep adds up."""
    if side == "rows":
        return True
    groups = (places // grid.pattern.m).sort(1).values
    return not bool((groups[:, 1:] == groups[:, :-1]).any())
