"""What the passes share whose masks follow scores: how their options are checked."""

from __future__ import annotations

from typing import get_args

from sparsec.errors import RecipeError
from sparsec.oneshot.scores import Normalise
from sparsec.training.parts import Scope
from sparsec.training.schedules import Cubic


def path(who: str, start: float, end: float, every: int) -> Cubic:
    """The schedule of a pass that prunes more and more. Raises RecipeError for shares that make no path."""
    if not 0 <= start < end <= 1:
        raise RecipeError(
            f"pass {who}: start is {start:g} and end {end:g}; expected shares of the steps with 0 <= start < end <= 1"
        )
    if every < 1:
        raise RecipeError(f"pass {who}: every is {every}; expected 1 or more")
    return Cubic(start, end, every)


def check(who: str, scope: str = "local", normalise: str = "none", **decays: float) -> None:
    """Raise RecipeError for an option that has no such value. `decays`: of running means, from 0 to below 1."""
    for name, value, words in (("scope", scope, get_args(Scope)), ("normalise", normalise, get_args(Normalise))):
        if value not in words:
            raise RecipeError(f"pass {who}: {name} is {value!r}; expected one of {', '.join(words)}")
    for name, decay in decays.items():
        if not 0 <= decay < 1:
            raise RecipeError(f"pass {who}: {name} is {decay:g}; expected a decay from 0 to below 1")
