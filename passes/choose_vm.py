"""The choose-vm pass: a pattern for each site that has none, under a budget of speed, latency or density."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sparsec.backend import Backend, Check, CheckData, Emitted, Verdict
from sparsec.choosing.diversity import Diversity
from sparsec.choosing.options import Budget, Objective
from sparsec.choosing.request import CANDIDATES, Mode, Request
from sparsec.cost import Cost, TokenRange
from sparsec.errors import RecipeError, UsageError
from sparsec.intersection import joined
from sparsec.layout import Values
from sparsec.pattern import Pattern
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.search import Choice, choose


@dataclass(frozen=True)
class ChooseVM(Pass):
    """Give each site a pattern, V and M included, or leave it dense with the reason; no weight and no node is changed.

    1. The budget is the one option of speedup, latency and density that is given.
    2. A site whose pattern was set before, or that is excluded, is left alone, and counts in the budget.
    3. A site that stays dense is excluded with that reason, so nothing is dense silently.
    4. The choice is in the report as `targets`: `compile` stores them in the recipe in place of this pass.
    5. A run that was interrupted goes on with the choice that it had made: times are never measured twice alike.
    """

    name: ClassVar[str] = "choose-vm"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    equivalence: ClassVar[Equivalence] = "exact"

    budget: str = ""
    """speedup, latency or density: may be said besides giving its amount."""
    speedup: float = 0.0
    """Times faster than dense that the whole model shall be, as predicted on this machine."""
    latency: float = 0.0
    """Milliseconds of a run of the whole model."""
    density: float = 0.0
    """Share of the weights of all sites that may stay."""
    tokens: int = 128
    mode: Mode = "ours"
    objective: Objective = "retained"
    uniform: bool = False
    candidates: str = ""
    """Comma-separated patterns; empty: 2:4 and V:2:M of four V and seven M."""
    also: str = ""
    """N:M that every candidate must follow too: 64:2:5 becomes 64:2:5+2:4 (see `joined`)."""
    diversity: Diversity = "counted"
    values: str = ""
    """What sparse weights are stored as; empty: what the recipe says."""

    def __post_init__(self) -> None:
        if str(self) != self.name:  # a pass without options is a value all the same; it cannot run
            self._request(self.values or "fp32")  # type: ignore[arg-type]

    def run(self, program: Program, ctx: Context) -> PassResult:
        free = [site for site in program.sites if site.eligible and site.pattern is None]
        taken = [site for site in program.sites if site not in free]
        notes = [Note(site.name, site.excluded or f"has {site.pattern} already") for site in taken]
        if not free:
            return PassResult(program, tuple(notes), {"chosen": 0})  # rule 2
        file = ctx.workdir / self.name / "choice.json" if ctx.workdir else None
        if file and file.exists():
            record = json.loads(file.read_text())  # rule 5
        else:
            record = self._record(program, ctx)
            if file:
                _keep(file, record)
        changed = []
        for site in free:
            text, reason = record["patterns"].get(site.name), record["dense"].get(site.name)
            if text is None:
                changed.append(site.replace(excluded=reason))  # rule 3
                notes.append(Note(site.name, reason))
            else:
                changed.append(site.replace(pattern=Pattern.parse(text)))
        return PassResult(program.with_sites(changed), tuple(notes), record["report"])

    def _record(self, program: Program, ctx: Context) -> dict[str, Any]:
        """The choice as plain data: patterns, why other sites stay dense, and the report."""
        values: Values = self.values or ctx.resources.get("values", "fp32")  # type: ignore[assignment]
        found = choose(
            program,
            _backend(ctx),
            self._request(values),
            batches=lambda: ctx.calibration(self.name).batches,
            seed=ctx.seed,
            progress=ctx.progress,
        )
        spent = f"dense by {self.name}: other sites lose less for the same {self._budget[0]}"
        dense = {name: spent for name, text in found.patterns.items() if text is None}
        return {"patterns": dict(found.patterns), "dense": dense | dict(found.left), "report": _report(found)}

    @property
    def _budget(self) -> tuple[Budget, float]:
        given: dict[Budget, float] = {"speedup": self.speedup, "latency": self.latency, "density": self.density}
        asked = [(name, amount) for name, amount in given.items() if amount != 0]
        if len(asked) != 1 or self.budget not in ("", asked[0][0]):
            found = ", ".join(f"{name}={amount:g}" for name, amount in asked) or "none"
            found += f" with budget={self.budget}" if self.budget else ""
            raise RecipeError(
                "pass choose-vm: expected one of speedup, latency and density, such as choose-vm{speedup=1.5}; found "
                f"{found}"
            )
        return asked[0]

    def _request(self, values: Values) -> Request:
        budget, amount = self._budget
        candidates = tuple(part.strip() for part in self.candidates.split(",")) if self.candidates else CANDIDATES
        if self.also and self.mode == "paper":
            raise RecipeError(f"pass choose-vm: mode paper chooses among V:2:M only; leave out also={self.also}")
        if self.also:
            candidates = tuple(dict.fromkeys(joined(text, self.also) for text in candidates))
        try:
            return Request(
                budget, amount, self.tokens, self.mode, self.objective, self.uniform, candidates, self.diversity, values
            )
        except UsageError as error:
            error.args = (f"pass choose-vm: {error}",)
            raise


def _keep(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(json.dumps(record))
    os.replace(scratch, file)


def _report(found: Choice) -> dict[str, Any]:
    data: dict[str, Any] = {
        "chosen": sum(text is not None for text in found.patterns.values()),
        "density": found.density,
        found.figure.key: found.quality,
        "targets": found.targets,
    }
    if found.request.timed:
        data |= {"tokens": found.tokens, "speed": found.speed, "predicted_seconds": found.seconds}
    if found.considered:
        data["considered"] = {one.pattern: one.diversity for one in found.considered}
    return data


def _backend(ctx: Context) -> Backend | None:
    """What knows costs here: the backend, or a cost alone, which is then believed for every site and pattern."""
    if isinstance(backend := ctx.resources.get("backend"), Backend):
        return backend
    return _Believed(ctx.cost) if ctx.cost else None


class _Believed(Backend):
    """Only predicts."""

    name: ClassVar[str] = "cost"
    describes: ClassVar[str] = "a cost that was given"

    def __init__(self, cost: Cost) -> None:
        self._cost = cost

    def cost(self, shape: tuple[int, int, int], pattern: Pattern, tokens: int, values: Values = "fp32") -> float:
        return self._cost(shape, pattern, tokens, values)

    def plan(self, program: Program, values: Values = "fp32", tokens: TokenRange | None = None) -> tuple[Verdict, ...]:
        return tuple(Verdict(site.name, True, "given", "") for site in program.sites.sparse)

    def emit(self, program: Program, folder: Path, values: Values = "fp32") -> Emitted:
        raise UsageError("a cost alone writes nothing")

    def verify(self, folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
        raise UsageError("a cost alone proves nothing")

    def load(self, folder: Path, manifest: dict[str, Any]) -> Any:
        raise UsageError("a cost alone runs nothing")
