"""What is promised, and whether what was measured keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from oneshot.cases import Case, Outcome, Size
from oneshot.materials import one_block

SMALL, LARGE = (16, 64), (128, 128)
Metric = Literal["time", "error", "memory", "violated"]
UNITS: dict[Metric, str] = {"time": "s CPU", "error": "relative error", "memory": "MB", "violated": "layers violated"}
ONE_BLOCK = "one block"


@dataclass(frozen=True)
class Gate:
    """The best of sparsec's `methods`, divided by the peer (`tool/method`), must be at most `bound`.

    The metric `violated` is no ratio: the number of layers that break the pattern must be at most `bound`.
    """

    name: str
    model: str
    methods: tuple[str, ...]
    peer: str
    metric: Metric
    bound: float
    stretch: float | None = None
    pattern: str = "2:4"
    sizes: tuple[Size, ...] = (SMALL, LARGE)

    def ours(self, size: Size) -> list[Case]:
        return [Case("sparsec", method, self.model, size, self.pattern) for method in self.methods]

    def theirs(self, size: Size) -> Case | None:
        tool, _, method = self.peer.partition("/")
        return Case(tool, method, self.model, size, self.pattern) if method else None

    def cases(self, size: Size) -> list[Case]:
        theirs = self.theirs(size)
        return [*self.ours(size), *([theirs] if theirs else [])]


@dataclass(frozen=True)
class Row:
    """A gate at one size: values in the metric's unit, `measured` what is held against the bound."""

    gate: Gate
    size: Size
    ours: float | None
    theirs: float | None
    measured: float | None
    met: bool | None
    """None: skipped, because the peer is not to be had."""
    reason: str = ""

    @property
    def stretched(self) -> bool | None:
        stretch = self.gate.stretch
        return None if stretch is None or self.measured is None else self.measured <= stretch


def judge(gate: Gate, size: Size, found: Mapping[Case, Outcome]) -> Row:
    """A failure of sparsec's or of the peer's run is a gate missed; a peer that cannot be installed skips it."""
    ours = {case: found[case] for case in gate.ours(size)}
    values = [_value(gate.metric, outcome) for outcome in ours.values() if not outcome.failure]
    if not values:
        return Row(gate, size, None, None, None, False, "; ".join(f"{c}: {o.failure}" for c, o in ours.items()))
    best, peer = min(values), gate.theirs(size)
    theirs = float(one_block(gate.model, *size)) / 1e6 if gate.peer == ONE_BLOCK else None
    failure = found[peer].failure if peer else ""
    if peer and not failure:
        theirs = _value(gate.metric, found[peer])
    if gate.metric == "violated":
        return Row(gate, size, best, theirs, best, best <= gate.bound, failure)
    if theirs is None or failure:
        skipped = peer is not None and found[peer].unavailable
        return Row(gate, size, best, None, None, None if skipped else False, failure)
    ratio = best / theirs if theirs > 0 else float("inf")
    return Row(gate, size, best, theirs, ratio, ratio <= gate.bound)


def _value(metric: Metric, outcome: Outcome) -> float:
    if metric == "time":
        return outcome.fastest.seconds
    if metric == "memory":
        return outcome.peak / 1e6
    assert outcome.evaluation is not None
    return float(outcome.evaluation.error if metric == "error" else outcome.evaluation.violated)
