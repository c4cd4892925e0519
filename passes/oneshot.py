"""The oneshot pass: prune with calibration data, and let the weights that stay make up for those that go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from sparsec.columns import Solver as Columns
from sparsec.errors import RecipeError, UsageError
from sparsec.oneshot.engine import prune
from sparsec.oneshot.journal import Journal
from sparsec.oneshot.scores import Normalise, Score
from sparsec.oneshot.solving import Calibration, Method, Solver
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program


@dataclass(frozen=True)
class Oneshot(Pass):
    """Choose the weights to keep and change them so that each layer's outputs stay close; zeros stand in the weights.

    1. A site's pattern is the one it has, or `pattern` when no site has one.
    2. Layers are pruned in the order they run, each on what the pruned ones before it give (see `sparsec.oneshot`).
    3. A tied weight is pruned once. A site that is selected already is left alone; one without pattern is reported.
    4. A site that no calibration sample reaches is an error, or stays dense with that reason (`unreached`).
    5. A program with masks is refused: afterwards zeros stand in the weights and nowhere else.
    """

    name: ClassVar[str] = "oneshot"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"selected", "frozen"})
    equivalence: ClassVar[Equivalence] = "lossy"

    pattern: str = ""
    """Pattern for all sites not excluded, where none was set by targets."""
    solver: Solver = "alps"
    """alps, sparsegpt, or refit of the kept weights after `score`; none leaves weights as they are."""
    score: Score | Literal["default"] = "default"
    """What refit and none keep. By default obs, but wanda for none: there no weight makes up for another."""
    columns: Columns = "greedy"
    """How a score's V:N:M block chooses its 4 columns; sparsegpt and alps choose theirs by what they cost."""
    normalise: Normalise = "none"
    calibration: Calibration = "asymmetric"
    damping: float = 0.1
    """Share of the mean square input added to the Gram matrix: keeps few samples from being fitted too closely."""
    refit: bool = True
    """End sparsegpt with a refit."""
    bias: bool = True
    """Correct biases for the change of a layer's mean output."""
    unreached: str = "fail"
    """What becomes of sites that no sample reaches: fail, or dense."""

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise RecipeError(f"pass oneshot: damping is {self.damping:g}; expected a number above 0, such as 0.1")
        if self.unreached not in ("fail", "dense"):
            raise RecipeError(f"pass oneshot: unreached is {self.unreached!r}; expected fail or dense")

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites = program.sites
        if not sites.sparse:
            if not self.pattern:
                raise RecipeError("pass oneshot: no site has a pattern; set targets, or write oneshot{pattern=64:2:5}")
            sites = sites.with_targets({"*": self.pattern})  # rule 1
        if masked := [site.name for site in sites if site.mask]:  # rule 5
            raise RecipeError(f"{masked[0]} is masked already; put oneshot before mask, or freeze before it")
        program = program.replace(sites=sites)
        wanted = [site for site in sites if site.pattern is not None and site.selection is None]
        skipped = [Note(s.name, s.excluded or _why(s.selection is not None)) for s in sites if s not in wanted]
        score = ("wanda" if self.solver == "none" else "obs") if self.score == "default" else self.score
        method = Method(
            self.solver, score, self.columns, self.normalise, self.calibration, self.damping, self.refit, self.bias
        )
        batches = ctx.calibration(self.name).batches if wanted and method.calibrated else ()
        # Masks alone are found again faster than they are written and read.
        journal = Journal(ctx.workdir / self.name) if ctx.workdir and self.solver != "none" else None
        found = prune(program, wanted, batches, method, ctx.seed, ctx.progress, journal)
        changed = list(found.sites.values())
        if found.unreached and self.unreached == "fail":  # rule 4
            raise UsageError(
                f"{len(found.unreached)} sites see no token of the calibration data, the first is "
                f"{found.unreached[0]}; give more samples, leave them out with --ignore, or add --allow-dense"
            )
        reason = "no calibration sample reaches it"
        changed += [sites[name].replace(pattern=None, excluded=reason) for name in found.unreached]
        notes = [*skipped, *(Note(name, text) for name, text in found.notes.items())]
        notes += [Note(name, reason) for name in found.unreached]
        return PassResult(
            program.with_sites(changed), tuple(notes), {"pruned": len(found.sites), "error": found.errors}
        )


def _why(selected: bool) -> str:
    return "selected already" if selected else "no pattern"
