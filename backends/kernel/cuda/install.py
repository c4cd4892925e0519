"""Put a loaded graph on a GPU: sparse layers on the GPU kernels, everything else on torch's.

1. A layer runs sparse where its pattern has panels and it computes in fp16 or bf16. Others run dense, with the reason.
2. Panels are made on the GPU, one layer after the other, and what they were made from stays on the CPU.
3. int8 V:N:M, whose activations are rounded too, is computed by the portable operator: there is no dense kernel for it.
4. Results that only other sparse layers read, through arithmetic on each number, lie as those layers read them.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx
from sparsec.backends.kernel.cuda.linear import panel_linear
from sparsec.backends.kernel.cuda.panels import DTYPES, no_panels, pack
from sparsec.backends.kernel.fuse import fuse_activations
from sparsec.errors import UsageError
from sparsec.lowered import PackedCall, packed_calls, run_dense
from sparsec.ops import rounds_activations

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from sparsec.layout import SparseLayout

log = logging.getLogger("sparsec")
_aten = torch.ops.aten
_EACH = {  # they leave numbers where they lie
    _aten.mul.Tensor, _aten.add.Tensor, _aten.relu.default, _aten.gelu.default, _aten.silu.default, _aten.tanh.default,
    _aten.sigmoid.default,
}  # fmt: skip


def no_kernel(call: PackedCall) -> str | None:
    """Why a call has no kernel on a GPU, or None (rule 1)."""
    if call.view is not None:
        return "it is no plain linear layer"
    if call.dtype not in DTYPES:
        return f"it computes in {str(call.dtype).removeprefix('torch.')}; compile with --dtype bf16 for the GPU kernels"
    if call.layout.scales is not None:
        return "its values are int8; the GPU kernels take fp16 and bf16"
    return no_panels(call.layout.pattern)


def install_on(module: GraphModule, device: torch.device) -> GraphModule:
    """Replace every call on packed tables by a kernel on panels or by a dense weight, and move the graph. In place."""
    dense: Counter[str] = Counter()
    for call in packed_calls(module):
        if call.view is None and rounds_activations(call.layout):
            continue  # rule 3
        if reason := no_kernel(call):
            dense[reason] += 1
            run_dense(module, call)
            continue
        _install(module, call, device)
    for reason, count in dense.items():
        log.warning("%d sparse weights run dense on the GPU: %s", count, reason)
    fuse_activations(module)
    _fx.prune_unused(module)  # who reads nothing any more must not count as a reader
    lay_side_by_side(module)
    _fx.prune_unused(module)
    _fx.move(module, device)
    module.graph.lint()
    module.recompile()
    return module


def _install(module: GraphModule, call: PackedCall, device: torch.device) -> None:
    node, layout, name = call.node, call.layout, f"{call.site}_panels"
    if not _fx.has_tensor(module, name):  # a shared weight is packed once
        try:
            _fx.set_tensor(module, name, pack(_there(layout, device), call.dtype))
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise UsageError(
                f"{call.site}: no memory left on {device} for its panels ({layout.nbytes / 2**20:.0f} MiB of tables); "
                "free some, or choose another GPU"
            ) from error
    args = (node.args[0], _fx.attribute(module, name, node), node.args[4], layout.shape[1], str(layout.pattern))
    _fx.replace(node, _fx.call(node, panel_linear, args, node.meta[_fx.TYPE], panel_linear.__name__))


def _there(layout: SparseLayout, device: torch.device) -> SparseLayout:
    tables: dict[str, Any] = {name: table.to(device) for name, table in layout.tensors().items()}
    return dataclasses.replace(layout, **tables)


def lay_side_by_side(module: GraphModule) -> int:
    """Rule 4: the tokens of such results lie side by side, which spares the next layer a copy. Returns how many."""
    layers = set(_fx.calls(module.graph, panel_linear))
    turned = layers | {node for node in module.graph.nodes if node.target in _EACH}
    while spoilt := {node for node in turned if not _may_be_turned(node, turned, layers)}:
        turned -= spoilt
    for node in turned & layers:
        args = [*node.args, "none"][:6]  # the activation, if it has one
        new = _fx.call(node, panel_linear, (*args, False), node.meta[_fx.TYPE], node.name)
        _fx.replace(node, new)
    return len(turned & layers)


def _may_be_turned(node: Node, turned: set[Node], layers: set[Node]) -> bool:
    """Whether all that it reads, if it is no layer, is turned, and all who read it are, or are layers."""
    readers = all(user in turned - layers or (user in layers and user.args[0] is node) for user in node.users)
    return readers and bool(node.users) and (node in layers or set(node.all_input_nodes) <= turned)
