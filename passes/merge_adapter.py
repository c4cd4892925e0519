"""The merge-adapter pass: add a LoRA that peft trained to the weights, under their masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec import _fx
from sparsec.errors import RecipeError
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.training import adapters


@dataclass(frozen=True)
class MergeAdapter(Pass):
    """Make every weight that an adapter changes W + scale B A, without training; where it is pruned it stays zero.

    1. `adapter` is a folder that peft's `save_pretrained` wrote: a plain LoRA of modules of this model. Modules that
       were trained whole beside it, such as a head, take the place of the model's.
    2. A site with a selection keeps exactly what that keeps; one without is dense before and after. So a model that was
       pruned elsewhere needs its masks first, which are those of its zeros: mask | merge-adapter{adapter=F} | freeze.
    3. It goes before permute: an adapter knows the channels of the model that it was trained on.
    """

    name: ClassVar[str] = "merge-adapter"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    equivalence: ClassVar[Equivalence] = "lossy"

    adapter: str = ""

    def run(self, program: Program, ctx: Context) -> PassResult:
        if not self.adapter:
            raise RecipeError("pass merge-adapter: no adapter was named; write merge-adapter{adapter=FOLDER}")
        if any(entry["pass"] == str(self) for entry in program.history):
            raise RecipeError(
                f"pass merge-adapter: {self.adapter} is merged already; leave out the second merge-adapter"
            )
        changed, notes = list[str](), list[Note]()
        adapter = adapters.read(self.adapter)
        with torch.no_grad():
            whole = adapters.replaced(program, adapter)
            for site, weight in adapters.merged(program, adapter):
                site.write(program.module, weight)
                changed.append(site.name)
                if site.selection is None:
                    notes.append(Note(site.name, "it has no mask, so all of its weights changed"))
        for name, tensor in whole.items():
            _fx.set_tensor(program.module, name, torch.nn.Parameter(tensor, requires_grad=False))
        data = {"merged": len(changed), "sites": changed} | ({"replaced": sorted(whole)} if whole else {})
        return PassResult(program, tuple(notes), data)
