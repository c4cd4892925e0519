"""Where the variables of a program's axes (`axes.Variable`) stand in the matrices of its sites: freedoms to search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsec.axes import Axes, Variable
from sparsec.axes.moves import numbered
from sparsec.permuting.objective import Grid, grouped
from sparsec.permuting.search import Freedom, Role, Side, matters

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.sites import Site


@dataclass
class Places:
    """The matrices to permute, the freedoms by which they may be, and why other variables are left alone."""

    grids: list[Grid] = field(default_factory=list)
    freedoms: list[Freedom] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    """Of each freedom."""
    left: dict[str, str] = field(default_factory=dict)
    """Variable -> why it is not searched."""


def find(axes: Axes, sites: Sequence[Site], scores: Mapping[str, Tensor], held: Set[str] = frozenset()) -> Places:
    """`sites`: those to keep more of, whose patterns have groups of columns; `scores`: (batch, rows, cols) of each.

    `held`: weights that may not be moved, because their pattern is chosen already.
    """
    places, by_name, first = Places(), {site.name: site for site in sites}, dict[str, int]()
    for site in sites:
        pattern = grouped(site.pattern)
        assert pattern is not None, f"{site.name}: {site.pattern} has no groups of columns"
        first[site.name] = len(places.grids)
        places.grids += [Grid.of(score, pattern) for score in scores[site.name]]
    for variable in axes.variables:
        if taken := [move.tensor for move in variable.moves if move.tensor in held]:
            places.left[variable.name] = f"it moves {taken[0]}, whose pattern is already chosen"
            continue
        moves = [(move, dim) for move in variable.moves if move.tensor in first for dim in move.dims]
        roles: list[Role] = []
        for move, dim in moves:
            things = numbered(move, variable, dim)
            found = None if things is None else _roles(by_name[move.tensor], things, variable.size, first[move.tensor])
            if found is None:
                places.left[variable.name] = f"it does not move whole rows or columns of {move.tensor}"
                break
            roles += found
        roles = [
            role for role in roles if any(matters(places.grids[role.grid], role.side, p) for p in role.places.values())
        ]
        if variable.name in places.left:
            continue
        if not roles:
            places.left[variable.name] = "no pattern keeps more by it"
            continue
        contexts = math.prod(leaf.size for leaf in variable.per)
        places.freedoms.append(Freedom(variable.name, contexts, variable.size, tuple(roles)))
        places.variables.append(variable)
    return places


def _roles(site: Site, things: Tensor, size: int, first: int) -> list[Role] | None:
    """Roles in the matrices of a site; None where neither rows nor columns move as a whole.

    things: broadcasts to the parameter's shape; the number context * size + thing of every element, -1 where none is.
    """
    matrices = site.view.to_matrices(things.expand(site.view.parameter))
    sides: list[tuple[Side, Tensor]] = [("cols", matrices[:, :1]), ("rows", matrices[:, :, :1])]
    for side, line in sides:
        if bool((matrices == line).all()):
            found = [_by_context(numbers, size) for numbers in line.flatten(1)]
            if any(places is None for places in found):
                return None
            return [Role(first + item, side, places) for item, places in enumerate(found) if places]
    return None


def _by_context(numbers: Tensor, size: int) -> dict[int, Tensor] | None:
    """Context -> (size, count) positions of its things along an axis.

    None where things of a context are not there, or not equally often: they stand in other matrices (groups of a
    convolution), which change places as a whole.
    """
    import torch

    places = (numbers >= 0).nonzero()[:, 0]
    order = numbers[places].argsort(stable=True)
    places, here = places[order], numbers[places[order]].long()
    found = {}
    for context in torch.unique(here // size).tolist():
        mine = here // size == context
        counts = (here[mine] % size).bincount(minlength=size)
        if bool((counts != counts[0]).any()):
            return None
        found[context] = places[mine].view(size, -1)
    return found
