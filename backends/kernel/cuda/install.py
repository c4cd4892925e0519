"""Put a loaded graph on a GPU: sparse layers on the GPU kernels, everything else on torch's.

1. A layer runs as `choice` says where it computes in fp16 or bf16. Others run dense, with the reason; on a GPU that is
   too old for the kernels all do.
2. Panels are made on the GPU, one layer after the other, and what they were made from stays on the CPU.
3. int8 V:N:M, whose activations are rounded too, is computed by the portable operator: there is no dense kernel for it.
4. Results that only other sparse layers read, through arithmetic on each number, lie as those layers read them.
5. What several sparse layers read is laid out for them once.
6. Their kernels are compiled and loaded before the first call, for any number of tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx
from sparsec.backend import Verdict
from sparsec.backends.kernel.cuda import ahead
from sparsec.backends.kernel.cuda.choice import choose
from sparsec.backends.kernel.cuda.destination import Destination
from sparsec.backends.kernel.cuda.linear import panel_linear, side_by_side
from sparsec.backends.kernel.cuda.panels import DTYPES, no_panels, pack
from sparsec.backends.kernel.fuse import activation_behind, fuse_activations
from sparsec.errors import UsageError
from sparsec.layout import decompress
from sparsec.lowered import PackedCall, packed_calls, run_dense
from sparsec.ops import rounds_activations
from sparsec.semi_structured import compress_weight, compress_weights

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from sparsec.layout import SparseLayout
    from sparsec.semi_structured import Compress

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
    return None


def layers_anywhere(calls: Iterable[PackedCall]) -> tuple[set[ahead.Layer], set[str]]:
    """What calls may ask of any GPU, and why the others ask nothing."""
    layers: set[ahead.Layer] = set()
    reasons = set()
    for call in calls:
        if reason := no_kernel(call) or no_panels(call.layout.pattern):
            reasons.add(reason)
            continue
        behind = activation_behind(call.node)
        layers |= ahead.anywhere(ahead.layer_of(call), behind.name if behind else "none")
    return layers, reasons


def install_on(module: GraphModule, there: Destination) -> dict[str, Verdict]:
    """Replace every call on packed tables by what shall run there, and move the graph. In place; tells what runs.

    Raises UsageError where the GPU has no memory left; the module then holds no tensors any more.
    """
    try:
        return _install_on(module, there)
    except BaseException:  # its traceback keeps the module
        for part in module.modules():
            part._parameters.clear()
            part._buffers.clear()
        torch.cuda.empty_cache()
        raise


def _install_on(module: GraphModule, there: Destination) -> dict[str, Verdict]:
    calls, device, layers = packed_calls(module), there.device, {}
    verdicts = {call.site: verdict(call, there, _operators_behind(call)) for call in calls}
    for call in calls:
        kernel = verdicts[call.site].kernel
        if kernel == "panels":
            layers[_install(module, call, device)] = ahead.layer_of(call)
        elif kernel != "reference":
            run_dense(module, call)
    dense = Counter(one.reason for one in verdicts.values() if not one.sparse and one.reason != there.too_old)
    for reason, count in dense.items():
        log.warning("%d sparse weights run dense on the GPU: %s", count, reason)
    fuse_activations(module)
    _fx.prune_unused(module)  # who reads nothing any more must not count as a reader
    lay_side_by_side(module)
    lay_once(module)
    _fx.prune_unused(module)
    with room("the model", device, "other weights"):
        _fx.move(module, device)
    twos = [f"{site}_dense" for site, one in verdicts.items() if one.kernel == "cuSPARSELt"]
    if there.compress is not None:
        for name in twos:
            with room(name.removesuffix("_dense"), device, "2:4 form"):
                compress_weights(module, [name], there.compress)
    module.graph.lint()
    module.recompile()
    ahead.load(ahead.layers_in(module, layers), device)
    return verdicts


def verdict(call: PackedCall, there: Destination, operators: int = 0) -> Verdict:
    """What runs a weight there, by rules 1 and 3. `operators`: of an activation that panels would apply."""
    layout = call.layout
    if call.view is None and rounds_activations(layout):
        return Verdict(call.site, False, "reference", "its activations are rounded to int8; the GPU has no such kernel")
    if reason := there.too_old or no_kernel(call):
        return Verdict(call.site, False, "dense", reason)
    chosen = choose(
        layout.pattern, *layout.shape[1:], there.table, there.tokens, dtype=call.dtype,
        moved=layout.rows is not None, two_of_four=there.compress is not None, operators=operators,
    )  # fmt: skip
    return Verdict(call.site, chosen.sparse, chosen.kernel, chosen.reason)


def _operators_behind(call: PackedCall) -> int:
    found = activation_behind(call.node)
    return found.operators if found else 0


def _install(module: GraphModule, call: PackedCall, device: torch.device) -> str:
    """Run a call on panels, whose name is returned."""
    node, layout, name = call.node, call.layout, f"{call.site}_panels"
    if not _fx.has_tensor(module, name):  # a shared weight is packed once
        _fx.set_tensor(module, name, panels_of(call, device))
    args = (node.args[0], _fx.attribute(module, name, node), node.args[4], layout.shape[1], str(layout.pattern))
    _fx.replace(node, _fx.call(node, panel_linear, args, node.meta[_fx.TYPE], panel_linear.__name__))
    return name


def panels_of(call: PackedCall, device: torch.device) -> Tensor:
    """The panels of a call's weight, made there (rule 2). Raises UsageError where there is no memory left."""
    with room(call.site, device, f"panels ({call.layout.nbytes / 2**20:.0f} MiB of tables)"):
        return pack(_on(device, call.layout), call.dtype)


def compressed_of(call: PackedCall, device: torch.device, compress: Compress) -> Tensor:
    """The same, in the form of torch's 2:4 product. Raises ArtifactError where the weight is not 2:4."""
    with room(call.site, device, "2:4 form"):
        return compress_weight(call.site, decompress(_on(device, call.layout), call.dtype)[0], compress)


@contextmanager
def room(site: str, device: torch.device, what: str) -> Iterator[None]:
    """Names the weight for which a GPU has no memory left, and gives back what was taken for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold what was made of it so far
        torch.cuda.empty_cache()
        raise UsageError(
            f"{site}: no memory left on {device} for its {what}; free some, or choose another GPU"
        ) from error


def _on(device: torch.device, layout: SparseLayout) -> SparseLayout:
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


def lay_once(module: GraphModule) -> int:
    """Rule 5: one copy for all of them, in place of one in each. Returns how many there are."""
    readers: dict[Node, list[Node]] = {}
    for node in _fx.calls(module.graph, panel_linear):
        readers.setdefault(node.args[0], []).append(node)  # type: ignore[arg-type]
    shared = {x: layers for x, layers in readers.items() if len(layers) > 1 and not _is_turned(x)}
    for x, layers in shared.items():
        first = next(node for node in module.graph.nodes if node in layers)
        copy = _fx.call(first, side_by_side, (x,), x.meta[_fx.TYPE], "side_by_side")
        for node in layers:
            node.replace_input_with(x, copy)
    return len(shared)


def _is_turned(x: Node) -> bool:
    """Whether rule 4 has laid it out already."""
    return x.target is panel_linear and x.args[6:7] == (False,)


def _may_be_turned(node: Node, turned: set[Node], layers: set[Node]) -> bool:
    """Whether all that it reads, if it is no layer, is turned, and all who read it are, or are layers."""
    readers = all(user in turned - layers or (user in layers and user.args[0] is node) for user in node.users)
    return readers and bool(node.users) and (node in layers or set(node.all_input_nodes) <= turned)
