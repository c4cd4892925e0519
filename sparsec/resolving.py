"""What a recipe leaves open, decided: its default passes, patterns that passes chose, sites that are not worth it."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.backend import Backend
from sparsec.cost import UNDECLARED, TokenRange
from sparsec.errors import UsageError
from sparsec.pipeline import PassReport, Progress
from sparsec.program import Program
from sparsec.recipe import PERMUTE, WITH_DATA, WITHOUT_DATA, Recipe, parse_passes


def calibrate(backends: Sequence[Backend], program: Program, recipe: Recipe, progress: Progress) -> None:
    """Measure what the backends' cost tables lack for a program's patterns."""
    patterns = sorted({site.pattern for site in program.sites.sparse if site.pattern}, key=str)
    for one in backends:
        one.calibrate(patterns, recipe.values, progress)


def drop_slow(program: Program, recipe: Recipe, backend: Backend, progress: Progress) -> tuple[Program, Recipe]:
    """Leave sites dense that would not run faster sparse, with the reason; the recipe then says so by name."""
    if not program.sites.sparse:
        raise UsageError("--drop-slow must know the patterns before any pass runs: give --pattern or --layer")
    tokens = TokenRange.parse(recipe.tokens or UNDECLARED)
    calibrate([backend], program, recipe, progress)
    slow = {v.site: v.reason for v in backend.plan(program, recipe.values, tokens) if not v.sparse}
    if len(slow) == len(program.sites.sparse):
        name, reason = next(iter(slow.items()))
        raise UsageError(
            f"--drop-slow would drop all {len(slow)} sites, the first is {name}: {reason}; choose a sparser pattern, "
            "other --tokens, or leave out --drop-slow"
        )
    dropped = [program.sites[name].replace(pattern=None, excluded=f"dropped: {why}") for name, why in slow.items()]
    targets = {**recipe.targets, **dict.fromkeys(slow, "ignore")}
    return program.with_sites(dropped), recipe.model_copy(update={"targets": targets, "drop_slow": False})


def with_passes(recipe: Recipe, has_data: bool, allow_dense: bool) -> Recipe:
    """The recipe with its default passes named: those that need calibration data where there is some.

    They also follow a permute pass that stands alone: what it permutes for is pruned then.
    """
    given = parse_passes(recipe.passes) if recipe.passes else ()
    if any(one.name != PERMUTE for one in given):
        return recipe
    passes = WITH_DATA if has_data else WITHOUT_DATA
    if has_data and allow_dense:
        passes += "{unreached=dense}"
    return recipe.model_copy(update={"passes": " | ".join([*map(str, given), passes])})


def resolved(recipe: Recipe, reports: Sequence[PassReport]) -> Recipe:
    """The recipe with the targets that passes chose in place of those passes: it replays without choosing again."""
    chosen = [report for report in reports if "targets" in report.data]
    if not chosen:
        return recipe
    targets: dict[str, str] = {}
    for report in chosen:
        targets |= report.data["targets"]
    passes = " | ".join(report.text for report in reports if report not in chosen)
    return recipe.model_copy(update={"targets": targets | recipe.targets, "passes": passes})  # what was asked for wins
