"""The lower pass: replace linear layers by the sparse operator and its tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sparsec import _fx
from sparsec.errors import GraphError
from sparsec.layout import TABLES, Values, compress, decompress, stored_as
from sparsec.ops import nm_linear, nm_weight
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.sites import Site
from sparsec.uses import lowers_to_linear


@dataclass(frozen=True)
class Lower(Pass):
    """Store every sparse weight as packed tables, and turn linear layers into `sparsec::nm_linear` on them.

    1. The tables decompress to the weight bit for bit, or the pass raises and nothing is returned.
    2. Where every user of a weight is a plain linear (or GPT-2's Conv1D), each becomes `nm_linear`.
    3. Convolutions, experts, and weights read in parts or also looked up have no sparse kernel: they keep their
       operator and read `sparsec::nm_weight`, the unpacked tables.
    4. A site without selection keeps its weight and is reported.
    5. With `values` bf16 or int8 the tables hold rounded weights, and the program is no longer close to what it was:
       it declares `lossy`. Two layers that share a weight share the rounded one.
    6. Dropout, which eval mode has switched off, is removed: a lowered program is for inference.
    7. What runs is one pattern: of an intersection the first, with 0 where the second leaves a slot empty.
    """

    name: ClassVar[str] = "lower"
    requires: ClassVar[frozenset[str]] = frozenset({"frozen"})
    establishes: ClassVar[frozenset[str]] = frozenset({"lowered"})
    drops: ClassVar[frozenset[str]] = frozenset({"traced", "frozen"})  # the weights are tables now: no pass edits them
    equivalence: ClassVar[Equivalence] = "close"
    values: Values = "fp32"

    def __post_init__(self) -> None:
        if self.values != "fp32":
            object.__setattr__(self, "equivalence", "lossy")  # rule 5

    def run(self, program: Program, ctx: Context) -> PassResult:
        program.set_mode("eval")
        for node in _fx.calls(program.module.graph, torch.ops.aten.dropout.default):
            _fx.replace(node, node.all_input_nodes[0])  # rule 6
        notes, changed = [], []
        for site in program.sites:
            if site.selection is None:
                notes.append(Note(site.name, site.excluded or "no pattern"))  # rule 4
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
        for table, tensor in stored_as(layout, self.values).tensors().items():
            _fx.set_tensor(program.module, f"{site.name}_{table}", tensor)
        if lowers_to_linear(program.module, site):
            return site.replace(users=tuple(self._linear(program, site, user) for user in site.users))
        self._weight(program, site)
        return site

    def _linear(self, program: Program, site: Site, user: str) -> str:
        """Rule 2; the name of the new node."""
        node = _fx.find(program.module, user)
        x, bias = node.args[0], node.args[2] if len(node.args) > 2 else None
        if site.kind == "conv1d_hf":
            bias, x = node.args[:2] if len(node.args) > 2 else (None, node.args[0])
        *tables, scales, rows = _tables(program, site, node)
        args = (x, *tables, bias, _executable(site), site.shape[2], *_given(scales, rows))
        new = _fx.call(node, nm_linear, args, node.meta[_fx.TYPE], "nm_linear")
        _fx.replace(node, new)
        return new.name

    def _weight(self, program: Program, site: Site) -> None:
        """Rule 3."""
        for node in _fx.reads(program.module, site.name):
            view = site.view
            *tables, scales, rows = _tables(program, site, node)
            args = (*tables, _executable(site), site.shape[2], list(view.axes), list(view.parameter))
            rounded = self.values != "fp32"
            dtype = _fx.get_tensor(program.module, site.name).dtype if rounded else None
            args = (*args, *_given(scales, dtype, rows))
            new = _fx.call(node, nm_weight, args, node.meta[_fx.TYPE], "nm_weight")
            _fx.replace(node, new)


def _executable(site: Site) -> str:
    """Rule 7."""
    assert site.pattern is not None
    return str(site.pattern.executable)


def _given(*optional: Any) -> tuple[Any, ...]:
    """Optional last arguments, without those at the end that are None."""
    while optional and optional[-1] is None:
        optional = optional[:-1]
    return optional


def _tables(program: Program, site: Site, before: torch.fx.Node) -> list[Any]:
    """The get_attr nodes of all tables, in the order of `TABLES` (None where there is no such table)."""
    names = [f"{site.name}_{table}" for table in TABLES]
    present = [_fx.has_tensor(program.module, name) for name in names]
    return [
        _fx.attribute(program.module, n, before) if there else None for n, there in zip(names, present, strict=True)
    ]
