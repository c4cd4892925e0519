"""The calls of a lowered graph that read packed tables, each with its tables checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx
from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import SparseLayout, validate
from sparsec.ops import layout_of, nm_linear, nm_weight
from sparsec.pattern import NM, VNM
from sparsec.view import WeightView

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class SparseCall:
    """A node of a lowered graph that reads packed tables: nm_linear, or nm_weight with the view of its parameter."""

    node: Node
    site: str
    layout: SparseLayout
    view: WeightView | None

    @property
    def has_kernel(self) -> bool:
        """Whether a sparse kernel can run it on some machine."""
        is_fp32 = self.layout.values.dtype == torch.float32
        return self.view is None and isinstance(self.layout.pattern, (NM, VNM)) and is_fp32


def sparse_calls(module: GraphModule) -> list[SparseCall]:
    """All calls on packed tables, each checked; raises ArtifactError naming the site."""
    found = []
    for node in _fx.calls(module.graph, nm_linear):
        _, *tables, _, pattern, in_features = node.args
        found.append(_sparse_call(module, node, tables, pattern, in_features, None))
    for node in _fx.calls(module.graph, nm_weight):
        *tables, pattern, in_features, axes, parameter = node.args
        view = (axes, parameter)
        found.append(_sparse_call(module, node, tables, pattern, in_features, view))
    return found


def _sparse_call(
    module: GraphModule, node: Node, tables: list[Any], pattern: Any, in_features: Any, view: Any
) -> SparseCall:
    site = str(tables[0].target).removesuffix("_values")
    tensors = [_fx.get_tensor(module, str(table.target)) if table is not None else None for table in tables]
    try:
        layout = layout_of(tensors[0], tensors[1], tensors[2], str(pattern), int(in_features))  # type: ignore[arg-type]
    except PatternError as error:
        raise ArtifactError(f"{site}: {error}") from error
    validate(layout, site)
    if view is None:
        return SparseCall(node, site, layout, None)
    axes, parameter = tuple(view[0]), tuple(view[1])
    fits = sorted(axes) == list(range(len(parameter))) and math.prod(parameter) == math.prod(layout.shape)
    if not fits:
        raise ArtifactError(f"{site}: a parameter of shape {parameter} does not hold {layout.shape} weights")
    return SparseCall(node, site, layout, WeightView(axes, parameter))
