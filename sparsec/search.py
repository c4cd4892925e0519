"""Choose a pattern for each site so that the whole model reaches a speed, and loses as little of its score as it can.

1. Speed is what `prediction` says; score is the share of a site's summed magnitude that is kept. A model's score is
   the geometric mean of its sites', each weighing as much as its magnitude: a site that keeps next to nothing ruins a
   model, however much the others keep.
2. Candidates that differ in V only and cost the same are one: the smallest V keeps the most.
3. A price of time is raised until the model is fast enough: each site then takes the option of least loss + price *
   time (Lagrange). One pattern for all sites is tried too, and taken where it keeps more.
4. Scores of large weights are estimated on evenly spread strips of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sparsec.backend import Backend
from sparsec.errors import SparsecError, UsageError
from sparsec.explain import Variant, plan, survey, table
from sparsec.layout import Values
from sparsec.pattern import VNM, Pattern
from sparsec.pipeline import Progress, no_progress
from sparsec.prediction import Prediction, Survey, predict
from sparsec.program import Program
from sparsec.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

CANDIDATES = ("2:4", *(f"{v}:2:{m}" for m in (5, 6, 8, 10, 12, 16, 32) for v in (16, 32, 64, 128)))
_STRIP, _STRIPS = 128, 2  # rows of a strip: a multiple of every V tried; how many of them a weight's score is read from
_HALVINGS = 60  # of the interval in which the price lies


@dataclass(frozen=True)
class Option:
    """What a site may become: a pattern, or None for dense, with its seconds in a run and what is lost of the score.

    `lost`: -log of the share kept, times the site's share of the model's magnitude; the losses of sites add up.
    """

    pattern: str | None
    seconds: float
    lost: float


@dataclass(frozen=True)
class Choice:
    """A pattern or None (dense) for each site that a sparse kernel could run."""

    tokens: int
    patterns: Mapping[str, str | None]
    dense_seconds: float
    seconds: float
    retained: float
    """Share of the score that these sites keep (rule 1)."""
    left: Mapping[str, str] = field(default_factory=dict)
    """The other sites, which stay dense: name -> why."""

    @property
    def speed(self) -> float:
        """Times faster than dense, as predicted."""
        return self.dense_seconds / self.seconds

    @property
    def targets(self) -> dict[str, str]:
        """The choice as a recipe's targets."""
        chosen = {name: pattern or "ignore" for name, pattern in self.patterns.items()}
        counts = list(chosen.values())
        common = max((p for p in chosen.values() if p != "ignore"), key=counts.count, default="ignore")
        dense = dict.fromkeys(self.left, "ignore")
        return {"*": common, **{name: text for name, text in chosen.items() if text != common}, **dense}


def choose(
    program: Program,
    backend: Backend,
    speedup: float,
    tokens: int,
    *,
    uniform: bool = False,
    candidates: Sequence[str] = CANDIDATES,
    ignore: Mapping[str, str] | None = None,
    values: Values = "fp32",
    progress: Progress = no_progress,
) -> Choice:
    """The patterns that make the model `speedup` times faster on this machine and keep the most.

    `uniform`: one pattern for all sites. `ignore`: selectors of sites that stay dense, with `ignore`. Raises
    SparsecError with the most that can be reached where that is less, UsageError for a speedup that asks for nothing.
    """
    if not (math.isfinite(speedup) and speedup > 1):
        raise UsageError(f"--speedup {speedup:g} asks for nothing; expected a number above 1, such as 1.5")
    planned = {text: plan(program, backend, text, {"*": text, **(ignore or {})}, values, ()) for text in candidates}
    running = {text: one for text, one in planned.items() if one.patterns}
    if not running:
        reason = next(v.reason for one in planned.values() for v in one.verdicts.values())
        raise SparsecError(f"no candidate has a sparse kernel here: {reason}")
    backend.calibrate([Pattern.parse(text) for text in running], values, progress)
    known = survey(program, backend, list(running.values()), [tokens], progress)
    made = {
        text: predict(known, known.profiles[0], one.patterns, table(backend, values)) for text, one in running.items()
    }
    options = _options(program, known, running, made, progress)
    dense = known.profiles[0].seconds
    chosen = _cheapest(options, made, speedup, uniform)
    spent = dense + sum(one.seconds - options[name][0].seconds for name, one in chosen.items())
    if dense / spent < speedup:
        raise SparsecError(_unreachable(speedup, known, dense / spent, options, uniform))
    left = {site.name: _why(site, planned) for site in program.sites if site.name not in options}
    patterns = {name: one.pattern for name, one in chosen.items()}
    return Choice(known.profiles[0].tokens, patterns, dense, spent, math.exp(-_lost(chosen)), left)


def _options(
    program: Program, known: Survey, running: Mapping[str, Variant], made: Mapping[str, Prediction], progress: Progress
) -> dict[str, list[Option]]:
    """For each site its options, dense first."""
    options: dict[str, list[Option]] = {}
    magnitudes = {site.name: float(site.read(program.module).abs().sum()) for site in known.sites}
    total = sum(magnitudes.values()) or 1.0
    layers = {text: {layer.site: layer for layer in one.layers} for text, one in made.items()}
    for done, site in enumerate(known.sites):
        progress("scoring", done, len(known.sites))
        score = site.read(program.module).abs()
        here = {text: each[site.name] for text, each in layers.items() if site.name in each}
        found = [Option(None, next(iter(here.values())).dense, 0.0)]
        seen: set[tuple[int, int, float]] = set()
        for text in sorted(here, key=_height):
            pattern, seconds = running[text].patterns[site.name], here[text].sparse
            key = (pattern.n, pattern.m, seconds) if isinstance(pattern, VNM) else (0, 0, seconds)
            if isinstance(pattern, VNM) and key in seen:
                continue  # rule 2
            seen.add(key)
            lost = -math.log(max(retained(pattern, score), 1e-6)) * magnitudes[site.name] / total
            found.append(Option(text, seconds, lost))
        options[site.name] = found
    return options


def retained(pattern: Pattern, score: Tensor) -> float:
    """Share of a score (batch, rows, cols) that a pattern keeps; rule 4."""
    import torch

    batch, rows, _ = score.shape
    if batch * rows > _STRIP * _STRIPS:
        flat, strips = score.flatten(0, 1), batch * rows // _STRIP
        starts = [strips * i // _STRIPS * _STRIP for i in range(_STRIPS)]
        score = torch.cat([flat[start : start + _STRIP] for start in starts])[None]
    mask = pattern.mask(pattern.project(score), score.shape[2])
    return float(score[mask].sum(dtype=torch.float64) / score.sum(dtype=torch.float64).clamp(min=1e-30))


def _height(text: str) -> int:
    pattern = Pattern.parse(text)
    return pattern.v if isinstance(pattern, VNM) else 0


def _cheapest(
    options: Mapping[str, list[Option]], made: Mapping[str, Prediction], speedup: float, uniform: bool
) -> dict[str, Option]:
    """Rule 3; the fastest there is where nothing is fast enough."""
    dense = next(iter(made.values())).dense
    room = dense / speedup - dense + sum(each[0].seconds for each in options.values())  # for all sites together
    same = []
    for text in made:
        picked = {name: next((o for o in each if o.pattern == text), None) for name, each in options.items()}
        if all(picked.values()):
            same.append({name: option for name, option in picked.items() if option})
    fitting = [one for one in same if _seconds(one) <= room]
    if uniform:
        return min(fitting, key=_lost) if fitting else min(same, key=_seconds)
    low, high = 0.0, 1.0
    while _seconds(_at(options, high)) > room and high < 1e30:
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _seconds(_at(options, middle)) <= room else (middle, high)
    found = _at(options, high)
    return min([found, *fitting], key=_lost) if _seconds(found) <= room else found


def _at(options: Mapping[str, list[Option]], price: float) -> dict[str, Option]:
    """Each site's option of least loss + price * time."""
    return {name: min(each, key=lambda one: one.lost + price * one.seconds) for name, each in options.items()}


def _seconds(chosen: Mapping[str, Option]) -> float:
    return sum(one.seconds for one in chosen.values())


def _lost(chosen: Mapping[str, Option]) -> float:
    return sum(one.lost for one in chosen.values())


def _why(site: Site, planned: Mapping[str, Variant]) -> str:
    """Why a site has no options."""
    reasons = [one.verdicts[site.name].reason for one in planned.values() if site.name in one.verdicts]
    return site.excluded or (reasons[0] if reasons else "ignored")


def _unreachable(speedup: float, known: Survey, most: float, options: Mapping[str, list[Option]], uniform: bool) -> str:
    made = known.profiles[0]
    dense = sum(each[0].seconds for each in options.values())
    best = dense / sum(min(one.seconds for one in each) for each in options.values())
    return (
        f"{speedup:g}x cannot be reached: the most is {most:.2f}x at {made.tokens} tokens on this machine"
        f"{' with one pattern for all sites' if uniform else ''}. {100 * (1 - dense / made.seconds):.0f} % of the "
        f"time is outside the sites, and the sparsest candidate makes the sites themselves {best:.2f}x faster; ask for "
        "less, or for another token count with --tokens"
    )
