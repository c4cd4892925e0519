"""What was chosen, and what is to be told about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sparsec.choosing.options import FIGURES, Figure
from sparsec.choosing.request import Request


@dataclass(frozen=True)
class Considered:
    """A pattern of mode paper: the smallest M of its V that meets the budget, and its diversity."""

    pattern: str
    diversity: float


@dataclass(frozen=True)
class Outlook:
    """What another budget would give. `speed`: 0 where time was not asked about."""

    speed: float
    density: float
    figure: float
    patterns: int


@dataclass(frozen=True)
class Choice:
    """A pattern or None (dense) for each site that had none and could get one."""

    request: Request
    tokens: int
    patterns: Mapping[str, str | None]
    dense_seconds: float
    """Of a run, as profiled; 0 where the budget is one of density."""
    seconds: float
    """Of a run with these patterns, as predicted."""
    density: float
    """Share of the weights of all sites that is kept."""
    quality: float
    """What `figure` says."""
    left: Mapping[str, str] = field(default_factory=dict)
    """The other sites without pattern, which stay dense: name -> why."""
    front: tuple[Outlook, ...] = ()
    considered: tuple[Considered, ...] = ()

    @property
    def speed(self) -> float:
        """Times faster than dense, as predicted; 0 where time was not asked about."""
        return self.dense_seconds / self.seconds if self.seconds else 0.0

    @property
    def figure(self) -> Figure:
        """What `quality` is."""
        return FIGURES[self.request.objective]

    @property
    def data(self) -> dict[str, Any]:
        """The choice as plain data."""
        key = self.figure.key
        found: dict[str, Any] = {"budget": self.request.budget, "amount": self.request.amount, "tokens": self.tokens}
        found |= {"mode": self.request.mode, "objective": self.request.objective, "density": self.density}
        found |= {key: self.quality, "figure": {"key": key, "words": self.figure.words}}
        if self.request.timed:
            found |= {"speed": self.speed, "seconds": self.seconds, "dense_seconds": self.dense_seconds}
        points = [
            {"density": one.density, key: one.figure, "patterns": one.patterns}
            | ({"speed": one.speed} if self.request.timed else {})
            for one in self.front
        ]
        found |= {"patterns": dict(self.patterns), "left": dict(self.left), "front": points}
        return found | (
            {"considered": {one.pattern: one.diversity for one in self.considered}} if self.considered else {}
        )

    @property
    def targets(self) -> dict[str, str]:
        """The choice as a recipe's targets; those that were there before come after them."""
        chosen = {name: pattern or "ignore" for name, pattern in self.patterns.items()}
        counts = list(chosen.values())
        common = max((p for p in chosen.values() if p != "ignore"), key=counts.count, default="ignore")
        dense = dict.fromkeys(self.left, "ignore")
        return {"*": common, **{name: text for name, text in chosen.items() if text != common}, **dense}
