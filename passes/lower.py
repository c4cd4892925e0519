"""The lower pass: replace linear layers by the sparse operator and its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from sparsec import _fx
from sparsec.errors import GraphError
from sparsec.layout import compress, decompress
from sparsec.ops import nm_linear
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.sites import Site


@dataclass(frozen=True)
class Lower(Pass):
    """Turn `linear(x, weight, bias)` of every sparse site into `sparsec::nm_linear` on packed tables.

    1. The tables decompress to the weight bit for bit, or the pass raises and nothing is returned.
    2. A site without selection keeps its linear and is reported.
    3. Dropout, which eval mode has switched off, is removed: a lowered program is for inference.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"frozen"})
    establishes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    drops: ClassVar[frozenset[str]] = frozenset({"traced", "frozen"})  # the weights are tables now: no pass edits them
    equivalence: ClassVar[Equivalence] = "close"

    def run(self, program: Program, ctx: Context) -> PassResult:
        program.set_mode("eval")
        for node in _fx.calls(program.module.graph, torch.ops.aten.dropout.default):
            _fx.replace(node, node.all_input_nodes[0])  # rule 3
        notes, changed = [], []
        for site in program.sites:
            if site.selection is None:
                notes.append(Note(site.name, site.excluded or "no pattern"))  # rule 2
                continue
            changed.append(self._lower(program, site))
        _fx.prune_unused(program.module)
        return PassResult(program.with_sites(changed), tuple(notes), {"lowered": len(changed)})

    def _lower(self, program: Program, site: Site) -> Site:
        assert site.pattern is not None and site.selection is not None
        weight = site.read(program.module)
        layout = compress(weight, site.pattern, site.selection)
        if not torch.equal(decompress(layout), weight):
            raise GraphError(
                f"{site.name}: the weight is not zero outside its selection; run freeze before lower"
            )  # rule 1
        names = {table: f"{site.name}_{table}" for table in layout.tensors()}
        for table, tensor in layout.tensors().items():
            _fx.set_tensor(program.module, names[table], tensor)
        users = []
        for user in site.users:
            node = _fx.find(program.module, user)
            tables = {table: _fx.attribute(program.module, name, node) for table, name in names.items()}
            bias = node.args[2] if len(node.args) > 2 else None
            args = (node.args[0], tables["values"], tables["positions"], tables.get("columns"), bias)
            new = _fx.call(node, nm_linear, (*args, str(site.pattern), site.shape[2]), node.meta[_fx.TYPE], "nm_linear")
            _fx.replace(node, new)
            users.append(new.name)
        return site.replace(users=tuple(users))
