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
from sparsec.pattern import NM, VNM, Pattern, Strip
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
    def dtype(self) -> torch.dtype:
        """What the layer computes in, which need not be what the values are stored as."""
        name = self.node.meta[_fx.TYPE].partition("[")[0]
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise ArtifactError(f"{self.site}: expected the type of a tensor on its layer, found {name!r}")
        return found

    @property
    def has_kernel(self) -> bool:
        """Whether a sparse kernel can run it on some machine."""
        fits = self.view is None and self.dtype == torch.float32
        return fits and no_kernel(self.layout.pattern, self.layout.stored) is None


def no_kernel(pattern: Pattern, stored: str) -> str | None:
    """Why values of a linear layer that are stored like this (see `SparseLayout.stored`) have no kernel, or None."""
    if isinstance(pattern, Strip):
        return f"no strip kernel yet: {pattern} is stored packed and multiplied dense; kernels read windows of columns"
    if not isinstance(pattern, (NM, VNM)):
        return f"{pattern} is stored small; no kernel makes it faster than dense"
    if stored == "int8" and not isinstance(pattern, VNM):
        return f"{pattern} is stored as int8 and multiplied in float32: int8 kernels need the 4 shared columns of V:N:M"
    if stored not in ("fp32", "bf16", "int8"):
        return f"{stored} values of {pattern} are stored packed and multiplied in float32; they have no sparse kernel"
    return None


def sparse_calls(module: GraphModule) -> list[SparseCall]:
    """All calls on packed tables, each checked; raises ArtifactError naming the site."""
    found = []
    for node in _fx.calls(module.graph, nm_linear):
        _, *tables, _, pattern, in_features = node.args[:7]
        tables += node.args[7:] or [None]  # scales
        found.append(_sparse_call(module, node, tables, pattern, in_features, None))
    for node in _fx.calls(module.graph, nm_weight):
        *tables, pattern, in_features, axes, parameter = node.args[:7]
        tables += node.args[7:8] or [None]
        view = (axes, parameter)
        found.append(_sparse_call(module, node, tables, pattern, in_features, view))
    return found


def _sparse_call(
    module: GraphModule, node: Node, tables: list[Any], pattern: Any, in_features: Any, view: Any
) -> SparseCall:
    site = str(tables[0].target).removesuffix("_values")
    tensors = [_fx.get_tensor(module, str(table.target)) if table is not None else None for table in tables]
    try:
        values, positions, columns, scales = tensors
        layout = layout_of(values, positions, columns, str(pattern), int(in_features), scales)  # type: ignore[arg-type]
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
