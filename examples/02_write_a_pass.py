"""Write a pass: zero the weakest rows of every weight, and let the manager prove that it keeps to its word."""

from dataclasses import dataclass
from typing import ClassVar

import torch

import sparsec
from sparsec.pipeline import Equivalence, Note


@dataclass(frozen=True)
class WeakRows(sparsec.Pass):
    """Set the rows of smallest norm to zero, so that those outputs are their bias alone.

    1. At least one row stays. 2. An excluded site is left alone and reported with its reason.
    """

    name: ClassVar[str] = "weak-rows"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})  # the manager refuses it after lower
    equivalence: ClassVar[Equivalence] = "lossy"  # try "exact": the manager compares outputs and refuses

    share: float = 0.25  # an option: weak-rows{share=0.5} in pass text

    def run(self, program: sparsec.Program, ctx: sparsec.Context) -> sparsec.PassResult:
        notes, zeroed = [], 0
        for site in program.sites:
            if site.excluded:
                notes.append(Note(site.name, site.excluded))  # rule 2
                continue
            weight = site.read(program.module).clone()  # (batch, rows, cols), however the model stores it
            norms = weight.norm(dim=2)
            count = min(int(self.share * norms.shape[1]), norms.shape[1] - 1)  # rule 1
            weakest = norms.argsort(dim=1)[:, :count]
            weight.scatter_(1, weakest[:, :, None].expand(-1, -1, weight.shape[2]), 0.0)
            site.write(program.module, weight)  # a new parameter: the traced model keeps its own
            zeroed += weakest.numel()
        return sparsec.PassResult(program, tuple(notes), {"zeroed": zeroed})


# A distribution offers it to everyone, in recipes and on the command line, by one line of its pyproject.toml:
#   [project.entry-points."sparsec.passes"]
#   weak-rows = "my_package:WeakRows"

model = torch.nn.Sequential(torch.nn.Linear(16, 40), torch.nn.GELU(), torch.nn.Linear(40, 8))
program = sparsec.trace(model, [torch.randn(4, 16)])
changed, (report,) = sparsec.PassManager((WeakRows(share=0.3),)).run_reported(program, check="outputs")
print(f"{report.text}: {report.data['zeroed']} rows are zero")
for note in report.notes:
    print(f"{note.site} was left alone: {note.text}")
print(f"{int((changed.sites['0.weight'].read(changed.module) == 0).all(dim=2).sum())} of 40 rows of the first layer")
