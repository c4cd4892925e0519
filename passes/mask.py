"""The mask pass: choose the weights to keep and put the choice into the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sparsec import _fx
from sparsec.columns import Solver
from sparsec.errors import PatternError, RecipeError
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.sites import Site


@dataclass(frozen=True)
class Mask(Pass):
    """Select weights by score and multiply them in the graph as `where(mask, weight, 0)`, the mask a bool buffer.

    1. A site's pattern is the one it has, or `pattern` when no site has one.
    2. A tied weight is masked once, for all its users.
    3. A site that is masked already is left alone; an excluded one is reported with its reason.
    4. The retained score, the share of the summed score that is kept, is recorded for every site.
    """

    name: ClassVar[str] = "mask"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"selected", "masked"})
    drops: ClassVar[frozenset[str]] = frozenset({"frozen"})
    equivalence: ClassVar[Equivalence] = "lossy"

    pattern: str = ""
    """Pattern for all sites not excluded, where none was set by targets."""
    score: Literal["magnitude"] = "magnitude"
    columns: Solver = "greedy"
    """How a V:N:M block's 4 columns are chosen."""

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites = program.sites
        if not sites.sparse:
            if not self.pattern:
                raise RecipeError("pass mask: no site has a pattern; set targets, or write mask{pattern=64:2:5}")
            sites = sites.with_targets({"*": self.pattern})  # rule 1
        program = program.replace(sites=sites)
        notes, changed = [], []
        for done, site in enumerate(sites):
            ctx.progress("mask", done, len(sites))
            if site.pattern is None or site.mask:
                notes.append(Note(site.name, _why(site)))  # rule 3
                continue
            changed.append(self._mask(program, site))
        return PassResult(program.with_sites(changed), tuple(notes), {"masked": len(changed)})

    def _mask(self, program: Program, site: Site) -> Site:
        assert site.pattern is not None
        weight = site.read(program.module)
        if not bool(torch.isfinite(weight).all()):
            raise PatternError(f"{site.name}: the weight holds NaN or Inf; repair the checkpoint before pruning it")
        score = weight.abs()
        selection = site.pattern.project(score, self.columns)
        mask = site.pattern.mask(selection, site.shape[2])
        name = f"{site.name}_mask"
        _fx.set_tensor(program.module, name, site.view.to_parameter(mask))
        _fx.insert_mask(program.module, site, name)  # rule 2
        total = float(score.sum(dtype=torch.float64))
        retained = float(score[mask].sum(dtype=torch.float64)) / total if total else 1.0  # rule 4
        return site.replace(mask=name, selection=selection, retained=retained)


def _why(site: Site) -> str:
    return site.excluded or ("masked already" if site.mask else "no pattern")
