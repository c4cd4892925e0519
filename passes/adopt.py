"""The adopt pass: take over the zeros of a model that was pruned elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsec.errors import PatternError, UsageError
from sparsec.inspection import look
from sparsec.pattern import Pattern
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.selection import kept_only
from sparsec.sites import Site


@dataclass(frozen=True)
class Adopt(Pass):
    """Make the zeros that stand in the weights the sites' selections; no weight changes.

    1. A site that has a pattern must follow it, or the pass raises. Any other gets the first of the usual patterns that
       its zeros follow, sparsest first, as `inspect` tells them; else `unstructured`, of its share of zeros.
    2. A site with hardly any zeros, or excluded, stays dense with that reason.
    3. It is an error where no site has zeros.
    """

    name: ClassVar[str] = "adopt"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"selected", "frozen"})
    equivalence: ClassVar[Equivalence] = "exact"

    def run(self, program: Program, ctx: Context) -> PassResult:
        changed, notes = list[Site](), list[Note]()
        for done, site in enumerate(program.sites):
            ctx.progress("adopt", done, len(program.sites))
            if site.mask or site.selection is not None or site.excluded:
                notes.append(Note(site.name, site.excluded or "selected already"))  # rule 2
                continue
            weight = site.read(program.module)
            found = site.pattern or _pattern(site.name, weight)
            if found is None:
                notes.append(Note(site.name, "no zeros to adopt"))
                changed.append(site.replace(excluded="it has no zeros to adopt"))
                continue
            changed.append(_adopted(program, site.replace(pattern=found), weight))
        patterns = [str(site.pattern) for site in changed if site.pattern]
        if not patterns and not program.sites.sparse:  # rule 3
            raise UsageError(
                "pass adopt: no site has zeros to speak of, so this model was not pruned; give --pattern and leave out "
                "adopt, or give the model that was pruned (its state dict: --weights)"
            )
        counts = {text: patterns.count(text) for text in dict.fromkeys(patterns)}
        return PassResult(program.with_sites(changed), tuple(notes), {"adopted": len(patterns), "patterns": counts})


def _pattern(name: str, weight: Tensor) -> Pattern | None:
    """What the zeros of a weight (batch, rows, cols) follow (rule 1)."""
    found = look(name, weight)
    if not found.sparse or found.pattern is not None:
        return found.pattern
    most = int((weight != 0).flatten(1).sum(1).max())
    zeros = math.floor(1e6 * (1 - most / weight[0].numel())) / 1e6  # rounded down: as many as there are may stay
    return Pattern.parse(f"unstructured:{zeros:.6f}") if zeros else None


def _adopted(program: Program, site: Site, weight: Tensor) -> Site:
    selection, mask = site.choose(weight.abs().float())
    if bool(((weight != 0) & ~mask).any()):
        assert site.pattern is not None
        broken = site.pattern.violations(weight)
        where = broken.first[0] if broken.count else "no groups of columns were found that fit"
        raise PatternError(
            f"pass adopt: {site.name} does not follow {site.pattern}: {where}; leave out the pattern to have it found, "
            "or prune to it: --passes 'mask | freeze'"
        )
    site.write(program.module, kept_only(weight.contiguous(), mask))  # zeros become +0.0, as tables read them
    return site.replace(selection=selection, retained=1.0)
