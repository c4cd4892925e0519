"""The freeze pass: fold masks into weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec import _fx
from sparsec.errors import PassError
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.selection import kept_only
from sparsec.sites import Site


@dataclass(frozen=True)
class Freeze(Pass):
    """Fold every mask into its weight, so that the program needs no mask to run; the selection stays on the site.

    1. Weights that are not kept become +0.0, whatever they were.
    2. A tied weight is folded once and all its users are rewired.
    3. A site without mask is left alone and reported.
    4. What is left must be what the site's selection keeps, or the pass raises: tables are written from it.
    """

    name: ClassVar[str] = "freeze"
    requires: ClassVar[frozenset[str]] = frozenset({"masked"})
    establishes: ClassVar[frozenset[str]] = frozenset({"frozen"})
    drops: ClassVar[frozenset[str]] = frozenset({"masked"})
    equivalence: ClassVar[Equivalence] = "exact"

    def run(self, program: Program, ctx: Context) -> PassResult:
        changed, notes = [], []
        for site in program.sites:
            if site.mask is None:
                notes.append(Note(site.name, site.excluded or "no mask"))  # rule 3
                continue
            mask = site.view.to_matrices(_fx.get_tensor(program.module, site.mask))
            weight = site.read(program.module)
            folded = kept_only(weight, mask)
            _check(site, mask, folded)  # rule 4
            site.write(program.module, folded)  # rule 1
            _fx.remove_mask(program.module, site.mask)  # rule 2
            changed.append(site.replace(mask=None))
        return PassResult(program.with_sites(changed), tuple(notes))


def _check(site: Site, mask: torch.Tensor, weight: torch.Tensor) -> None:
    if site.pattern is None or site.selection is None:
        return
    if torch.equal(mask, site.pattern.mask(site.selection, site.shape[2])):
        return
    if found := site.pattern.violations_of(weight, site.selection).first:
        raise PassError(
            f"pass freeze: {site.name}: its mask is not that of its selection of {site.pattern}: {found[0]}"
        )
