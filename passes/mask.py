"""The mask pass: choose the weights to keep and put the choice into the graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsec import _fx
from sparsec.columns import Solver
from sparsec.errors import PatternError, RecipeError
from sparsec.oneshot.engine import prune
from sparsec.oneshot.scores import SCORES, Normalise, Score, normalised
from sparsec.oneshot.solving import Method
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.sites import Site

_PART = 1 << 16


@dataclass(frozen=True)
class Mask(Pass):
    """Select weights by score and multiply them in the graph as `where(mask, weight, 0)`, the mask a bool buffer.

    1. A site's pattern is the one it has, or `pattern` when no site has one.
    2. A tied weight is masked once, for all its users.
    3. A site that is masked already is left alone; an excluded one is reported with its reason.
    4. The retained score, the share of the summed score that is kept, is recorded for every site.
    5. A site that is selected already, by a pass that changed its weights, gets the mask of that selection.
    6. A score that looks at inputs takes them from calibration data, with the layers before already masked.
    """

    name: ClassVar[str] = "mask"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"selected", "masked"})
    drops: ClassVar[frozenset[str]] = frozenset({"frozen"})
    equivalence: ClassVar[Equivalence] = "lossy"

    pattern: str = ""
    """Pattern for all sites not excluded, where none was set by targets."""
    score: Score = "magnitude"
    columns: Solver = "greedy"
    """How a V:N:M block's 4 columns are chosen."""
    normalise: Normalise = "none"
    """What is done to each row's scores before V rows are summed."""

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites = program.sites
        if not sites.sparse:
            if not self.pattern:
                raise RecipeError("pass mask: no site has a pattern; set targets, or write mask{pattern=64:2:5}")
            sites = sites.with_targets({"*": self.pattern})  # rule 1
        program = program.replace(sites=sites)
        wanted = [site for site in sites if site.pattern is not None and not site.mask]
        notes = tuple(Note(site.name, _why(site)) for site in sites if site not in wanted)  # rule 3
        chosen = [(site, _mask(site)) for site in wanted if site.selection is not None]  # rule 5
        chosen += self._choose(program, [site for site in wanted if site.selection is None], ctx)
        changed = [_insert(program, *pair) for pair in chosen]
        return PassResult(program.with_sites(changed), notes, {"masked": len(changed)})

    def _choose(self, program: Program, sites: Sequence[Site], ctx: Context) -> Iterator[tuple[Site, Tensor]]:
        """The sites with their selections, and the masks of these."""
        if SCORES[self.score].needs != "nothing" and sites:
            method = Method("none", self.score, self.columns, self.normalise)
            batches = ctx.calibration(self.name).batches
            found = prune(program.clone(), sites, batches, method, ctx.seed, ctx.progress)  # rule 6
            if found.unreached:
                raise PatternError(f"{found.unreached[0]}: no calibration sample reaches it; score it by magnitude")
            yield from ((site, _mask(site)) for site in found.sites.values())
            return
        for done, site in enumerate(sites):
            ctx.progress("mask", done, len(sites))
            yield self._by_magnitude(program, site)

    def _by_magnitude(self, program: Program, site: Site) -> tuple[Site, Tensor]:
        assert site.pattern is not None
        size = site.read(program.module).abs()
        total = float(size.sum(dtype=torch.float32))
        if not math.isfinite(total):
            raise PatternError(f"{site.name}: the weight holds NaN or Inf; repair the checkpoint before pruning it")
        score = normalised(size.float(), self.normalise)
        selection, mask = site.choose(score, self.columns)
        total = total if self.normalise == "none" else float(score.sum())
        retained = _kept(score, mask) / total if total else 1.0  # rule 4
        return site.replace(selection=selection, retained=retained), mask


def _kept(score: Tensor, mask: Tensor) -> float:
    """Sum of the scores that the mask keeps, in parts that fit the cache."""
    parts = zip(score.flatten().split(_PART), mask.flatten().split(_PART), strict=True)
    return sum(float((part * kept).sum()) for part, kept in parts)


def _mask(site: Site) -> Tensor:
    assert site.pattern is not None and site.selection is not None
    return site.pattern.mask(site.selection, site.shape[2])


def _insert(program: Program, site: Site, mask: Tensor) -> Site:
    name = f"{site.name}_mask"
    _fx.set_tensor(program.module, name, site.view.to_parameter(mask))
    _fx.insert_mask(program.module, site, name)  # rule 2
    return site.replace(mask=name)


def _why(site: Site) -> str:
    return site.excluded or ("masked already" if site.mask else "no pattern")
