"""Rewrite operators of a program that ONNX has no form for and that are only another spelling of one that it has.

1. What changes nothing in eval mode goes: dropout, alias, detach, contiguous, a cast to the type there is.
2. `to` in all its forms, and type_as, become one cast.
3. `&` and `|` become logical or bitwise operators, by type.
4. number - x becomes -x + number, which rounds alike: torch's own way to take it apart fails on numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sparsec import _fx
from sparsec.uses import operation

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_NOTHING = frozenset({"dropout", "alias", "detach", "contiguous", "lift_fresh_copy"})
_CASTS = frozenset({"to", "type_as", "_to_copy"})
_LOGIC = {
    "__and__": (torch.ops.aten.logical_and.default, torch.ops.aten.bitwise_and.Tensor),
    "__or__": (torch.ops.aten.logical_or.default, torch.ops.aten.bitwise_or.Tensor),
}


def simplify(module: GraphModule) -> None:
    """Edit the graph in place; what it computes in eval mode stays the same, bit for bit."""
    for node in list(module.graph.nodes):
        name = operation(node)
        if name in _NOTHING:
            _fx.replace(node, node.all_input_nodes[0])
        elif name in _CASTS:
            _cast(node)
        elif name in _LOGIC and len(node.all_input_nodes) == 2:
            logical, bitwise = _LOGIC[name]
            chosen: Callable[..., object] = logical if _type(node) == "bool" else bitwise
            _fx.replace(node, _fx.call(node, chosen, tuple(node.args), node.meta[_fx.TYPE], name.strip("_")))
        elif node.target == torch.ops.aten.rsub.Scalar and len(node.args) == 2:
            value, number = node.args
            minus = _fx.call(node, torch.ops.aten.neg.default, (value,), value.meta[_fx.TYPE], "neg")
            _fx.replace(node, _fx.call(node, torch.ops.aten.add.Tensor, (minus, number), node.meta[_fx.TYPE], "rsub"))


def _cast(node: Node) -> None:
    value, wanted = node.all_input_nodes[0], _type(node)
    if _type(value) == wanted:
        _fx.replace(node, value)
        return
    new = _fx.call(node, torch.ops.aten._to_copy.default, (value,), node.meta[_fx.TYPE], "cast")
    new.update_kwarg("dtype", getattr(torch, wanted))
    _fx.replace(node, new)


def _type(node: Node) -> str:
    text: str = node.meta[_fx.TYPE]
    return text.partition("[")[0]
