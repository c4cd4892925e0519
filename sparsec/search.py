"""Choose a pattern for each site so that the whole model meets a budget, and loses as little as it can.

1. Speed is what `prediction` says; what is lost, and by which measure, is in `choosing.losses`.
2. Candidates that differ in V only and take as much of the budget are one: the smallest V keeps the most. Those that
   take no less than dense are none.
3. The choice is the best that fits (`choosing.knapsack`). One pattern for all sites, and the rule of "Beyond 2:4"
   (`choosing.diversity`), can be asked for instead.
4. A site whose pattern was set before keeps it, an excluded one stays dense; both count in the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from sparsec.choosing.choice import Choice, Considered, Outlook
from sparsec.choosing.diversity import HEIGHTS, LEAST_M, MOST_M, diversity, most_diverse, smallest_m
from sparsec.choosing.front import Point, front
from sparsec.choosing.knapsack import cheapest, cheapest_uniform
from sparsec.choosing.losses import Batches, losses
from sparsec.choosing.options import FIGURES, Chosen, Figure, Option, Options, lost, total
from sparsec.choosing.request import CANDIDATES, Request
from sparsec.choosing.sizing import Sizer
from sparsec.errors import SparsecError, UsageError
from sparsec.pattern import VNM, Pattern
from sparsec.pipeline import Progress, no_progress

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.backend import Backend
    from sparsec.program import Program

__all__ = ["CANDIDATES", "Choice", "Considered", "Outlook", "Request", "choose"]


def _no_data() -> Sequence[dict[str, Tensor]]:
    raise UsageError("this objective looks at calibration data, and there is none; give --calib, or objective=retained")


def choose(
    program: Program,
    backend: Backend | None,
    request: Request,
    *,
    batches: Batches = _no_data,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Choice:
    """The patterns that meet the request's budget on this machine and lose the least.

    `backend` may be None for a budget of density; `batches` gives calibration data where the objective looks at some.
    Raises SparsecError with the most that can be reached where that is less, UsageError where dense meets the budget.
    """
    sizer = Sizer(program, backend, request, progress)
    if not sizer.free:
        raise UsageError("every site has a pattern already, or is excluded: there is nothing to choose")
    considered: tuple[Considered, ...] = ()
    if request.mode == "paper":
        considered, candidates = _paper(sizer)
    else:
        candidates = list(request.candidates)
        sizer.prepare(candidates)
    known = table = _table(sizer, candidates)
    fixed = sizer.fixed
    room = sizer.limit() - sizer.rest({**sizer.dense, **fixed}) - total(fixed, sizer.weight)
    _check_reachable(sizer, table, fixed, room)
    table = _with_losses(sizer, table, batches, seed)
    if request.mode == "paper" or request.uniform:
        found = cheapest_uniform(table, room, sizer.weight)
    else:
        found = cheapest(table, room, sizer.weight)
    if found is None:
        raise SparsecError("no candidate has a sparse kernel for every site; leave out uniform, or exclude the others")
    if total(found, sizer.weight) > room * (1 + 1e-9):
        raise SparsecError(_unreachable(sizer, found, fixed))
    complete = {**found, **fixed}
    figure = FIGURES[request.objective]
    reasons = {s.name: sizer.why(s) for s in program.sites if s.pattern is None and s.name not in found}
    return Choice(
        request,
        sizer.tokens,
        {name: one.pattern for name, one in found.items() if len(table[name]) > 1},
        sizer.dense_seconds,
        sizer.seconds(complete) if request.timed else 0.0,
        sizer.density(complete),
        figure.of(lost(found)),
        reasons | {name: _why(known[name], sizer) for name, each in table.items() if len(each) == 1},
        () if request.mode == "paper" else tuple(_outlooks(sizer, table, fixed, figure)),
        considered,
    )


def _why(options: Sequence[Option], sizer: Sizer) -> str:
    """Why a site has no options but dense. `options`: those that it had before losses were looked at."""
    if len(options) > 1:
        return "no calibration sample reaches it, so what a pattern would do to it is not known"
    return "no candidate is predicted to be faster" if sizer.request.timed else "no candidate is sparser"


def _table(sizer: Sizer, candidates: Sequence[str]) -> dict[str, list[Option]]:
    """For each site its options, dense first, none with a loss yet; rule 2."""
    every = sizer.request.uniform or sizer.request.mode == "paper"  # what one site gets, all get
    options = {name: [one] for name, one in sizer.dense.items()}
    seen: set[tuple[str, object, float]] = set()
    for text in sorted(candidates, key=_height):
        pattern = Pattern.parse(text)
        kind = (pattern.n, pattern.m) if isinstance(pattern, VNM) else text
        for name, one in sizer.options(text).items():
            takes = sizer.weight(one)
            if (name, kind, takes) not in seen and (every or takes < sizer.weight(options[name][0])):
                options[name].append(one)
            seen.add((name, kind, takes))
    return options


def _height(text: str) -> int:
    pattern = Pattern.parse(text).executable
    return pattern.v if isinstance(pattern, VNM) else 0


def _with_losses(sizer: Sizer, table: Options, batches: Batches, seed: int) -> dict[str, list[Option]]:
    """The table with what each option loses; a site that cannot be judged stays dense."""
    wanted = {name: [one.pattern for one in each if one.pattern] for name, each in table.items()}
    wanted = {name: texts for name, texts in wanted.items() if texts}
    known = losses(sizer.program, wanted, sizer.request.objective, batches, seed, sizer.progress)
    return {
        name: [
            Option(one.pattern, one.seconds, known[name][one.pattern] if one.pattern else 0.0, one.kept)
            for one in (each if name in known else each[:1])
        ]
        for name, each in table.items()
    }


def _paper(sizer: Sizer) -> tuple[tuple[Considered, ...], list[str]]:
    """Both phases: what was considered, and the pattern taken."""
    request = sizer.request
    sizer.prepare([f"{v}:2:{LEAST_M}" for v in HEIGHTS])

    def fits(v: int, m: int) -> bool:
        text = f"{v}:2:{m}"
        sizer.prepare([text])
        chosen = {**sizer.dense, **sizer.options(text), **sizer.fixed}
        return sizer.rest(chosen) + total(chosen, sizer.weight) <= sizer.limit()

    smallest = {v: smallest_m(partial(fits, v)) for v in HEIGHTS}
    found = [(v, m) for v, m in smallest.items() if m is not None]
    if not found:
        chosen = {**sizer.dense, **sizer.options(f"{HEIGHTS[0]}:2:{MOST_M}")}
        raise SparsecError(_unreachable(sizer, chosen, sizer.fixed))
    considered = tuple(Considered(f"{v}:2:{m}", diversity(v, m, request.diversity)) for v, m in found)
    v, m = most_diverse(found, request.diversity)
    return considered, [f"{v}:2:{m}"]


def _outlooks(sizer: Sizer, table: Options, fixed: Chosen, figure: Figure) -> list[Outlook]:
    every = {name: each[0] for name, each in table.items()}
    points: list[Point] = front(table, sizer.weight, sizer.request.uniform)
    found = []
    for one in points:
        seconds = sizer.seconds({**every, **fixed}) - sum(o.seconds for o in every.values()) + one.seconds
        density = sizer.density({**every, **fixed})
        density += (one.kept - sum(o.kept for o in every.values())) / sum(sizer.weights.values())
        speed = sizer.dense_seconds / seconds if sizer.request.timed else 0.0
        found.append(Outlook(speed, density, figure.of(one.lost), one.patterns))
    return found


def _check_reachable(sizer: Sizer, table: Options, fixed: Chosen, room: float) -> None:
    """Refuse what cannot be reached before anything is scored."""
    lightest = {name: min(each, key=sizer.weight) for name, each in table.items()}
    if total(lightest, sizer.weight) > room * (1 + 1e-9):
        raise SparsecError(_unreachable(sizer, lightest, fixed))


def _unreachable(sizer: Sizer, best: Chosen, fixed: Chosen) -> str:
    """`best`: the lightest choice there is."""
    request, complete = sizer.request, {**best, **fixed}
    uniform = " with one pattern for all sites" if request.uniform or request.mode == "paper" else ""
    if request.budget == "density":
        outside = sizer.rest({**sizer.dense}) / sum(sizer.weights.values())
        return (
            f"density {request.amount:g} cannot be reached: the least is {sizer.density(complete):.3f}{uniform}. "
            f"{100 * outside:.0f} % of the weights are in sites that are excluded or have their pattern already; ask "
            "for more, give sparser candidates, or include more sites"
        )
    dense = total({name: sizer.dense[name] for name in best}, sizer.weight)
    inside = dense / max(total(best, sizer.weight), 1e-12)
    seconds = sizer.seconds(complete)
    asked, most = (
        (f"{request.amount:g}x", f"the most is {sizer.dense_seconds / seconds:.2f}x")
        if request.budget == "speedup"
        else (f"latency {request.amount:g} ms", f"the least is {1e3 * seconds:.2f} ms")
    )
    return (
        f"{asked} cannot be reached: {most} at {sizer.tokens} tokens on this machine{uniform}. "
        f"{100 * (1 - dense / sizer.dense_seconds):.0f} % of the time is outside the sites, and the sparsest candidate "
        f"makes the sites themselves {inside:.2f}x faster; ask for less, or for another token count with --tokens"
    )
