"""Search the variables of a program for what its patterns keep, and fold what was found into its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.axes import analyse
from sparsec.axes.moves import apply, fold
from sparsec.permuting.places import find
from sparsec.permuting.proof import prove
from sparsec.permuting.search import search

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.sites import Site


@dataclass(frozen=True)
class Folded:
    """A permuted program, and what was done."""

    program: Program
    variables: dict[str, dict[str, object]]
    """Variable -> its kind and size, the seconds of its search, and the score that its sites keep more by it."""
    left: dict[str, str]
    """Variables that were not searched, and axes that may not be permuted with how many there are, and why."""
    difference: float | None
    """Largest relative difference of outputs in float64; None where nothing was permuted."""


def folded(
    program: Program,
    sites: Sequence[Site],
    scores: Mapping[str, Tensor],
    rounds: int,
    seed: int,
    deadline: float,
    progress: Callable[[int, int], None],
) -> Folded:
    """Permute for the patterns of `sites`; the program given is left as it is, and is returned where nothing is gained.

    Raises VerificationError where the permuted program is not proven to compute the same.
    """
    if not sites:
        return Folded(program, {}, {}, None)
    held = {site.name: site for site in program.sites if site.selection is not None or site.mask is not None}
    axes = analyse(program)
    places = find(axes, sites, scores, set(held))
    steps = search(places.grids, places.freedoms, rounds, seed, deadline, progress)
    left = dict(places.left)
    for why in axes.fixed.values():
        left[f"fixed: {why}"] = f"{sum(other == why for other in axes.fixed.values())} axes may not be permuted"
    variables: dict[str, dict[str, object]] = {}
    for freedom, variable in zip(places.freedoms, places.variables, strict=True):
        variables[freedom.name] = {
            "kind": variable.kind,
            "shape": list(variable.shape),
            "moves": len(variable.moves),
            "seconds": 0.0,
            "gain": 0.0,
        }
    after = program
    for step in steps:
        variable = places.variables[step.freedom]
        entry = variables[variable.name]
        entry["seconds"] += step.seconds  # type: ignore[operator]
        entry["gain"] += step.gain  # type: ignore[operator]
        order = step.order.view(variable.shape)
        if after is program:
            after = apply(program, variable, order)  # a copy, and the checks
        else:
            fold(after, variable, order)
    difference = prove(program, after, seed) if steps else None
    return Folded(after, variables, left, difference)
