"""The calls of a lowered graph that read packed tables, each with its tables checked, and their dense form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import SparseLayout, decompress, validate
from sparsec.ops import layout_of, nm_linear, nm_weight
from sparsec.view import WeightView

if TYPE_CHECKING:
    import torch
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class PackedCall:
    """A node of a lowered graph that reads packed tables: nm_linear, or nm_weight with the view of its parameter."""

    node: Node
    site: str
    layout: SparseLayout
    view: WeightView | None

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in, which need not be what the values are stored as."""
        import torch

        name = self.node.meta[_fx.TYPE].partition("[")[0]
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise ArtifactError(f"{self.site}: expected the type of a tensor on its layer, found {name!r}")
        return found


def packed_calls(module: GraphModule) -> list[PackedCall]:
    """All calls on packed tables, each checked; raises ArtifactError naming the site."""
    found = []
    for node in _fx.calls(module.graph, nm_linear):
        _, *tables, _, pattern, in_features, scales, rows = _filled(node, 9)
        tables += [scales, rows]
        found.append(_packed_call(module, node, tables, pattern, in_features, None))
    for node in _fx.calls(module.graph, nm_weight):
        *tables, pattern, in_features, axes, parameter, scales, _, rows = _filled(node, 10)
        tables += [scales, rows]
        view = (axes, parameter)
        found.append(_packed_call(module, node, tables, pattern, in_features, view))
    return found


def _filled(node: Node, count: int) -> list[Any]:
    """A call's arguments, None for those it leaves out at the end."""
    return [*node.args, *[None] * count][:count]


def _packed_call(
    module: GraphModule, node: Node, tables: list[Any], pattern: Any, in_features: Any, view: Any
) -> PackedCall:
    site = str(tables[0].target).removesuffix("_values")
    tensors = [_fx.get_tensor(module, str(table.target)) if table is not None else None for table in tables]
    try:
        values, positions, columns, *more = tensors
        facts = str(pattern), int(in_features)
        layout = layout_of(values, positions, columns, *facts, *more)  # type: ignore[arg-type]
    except PatternError as error:
        raise ArtifactError(f"{site}: {error}") from error
    validate(layout, site)
    if view is None:
        return PackedCall(node, site, layout, None)
    axes, parameter = tuple(view[0]), tuple(view[1])
    fits = sorted(axes) == list(range(len(parameter))) and math.prod(parameter) == math.prod(layout.shape)
    if not fits:
        raise ArtifactError(f"{site}: a parameter of shape {parameter} does not hold {layout.shape} weights")
    return PackedCall(node, site, layout, WeightView(axes, parameter))


def run_dense(module: GraphModule, call: PackedCall) -> None:
    """Replace a call by the plain product with its unpacked weight, or by that weight. A shared one is unpacked once.

    The tables stay; `_fx.prune_unused` drops them when all calls are replaced.
    """
    import torch

    node, name = call.node, f"{call.site}_dense"
    if not _fx.has_tensor(module, name):
        weight = decompress(call.layout, call.dtype)
        _fx.set_tensor(module, name, weight[0] if call.view is None else call.view.to_parameter(weight))
    new = weight_node = _fx.attribute(module, name, node)
    if call.view is None:
        args = (node.args[0], weight_node, node.args[4])
        new = _fx.call(node, torch.ops.aten.linear.default, args, node.meta[_fx.TYPE], "linear")
    _fx.replace(node, new)
