"""Put this machine's kernels in place of the calls on packed tables, when an artifact is loaded."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, cast

from sparsec import _fx
from sparsec.backends.kernel.calls import has_kernel
from sparsec.backends.kernel.cost import too_slow
from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.backends.kernel.fuse import fuse_activations
from sparsec.lowered import PackedCall, packed_calls, run_dense
from sparsec.ops import rounds_activations
from sparsec.uses import lowers_to_linear, operation

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from sparsec.cost import TokenRange
    from sparsec.layout import Values
    from sparsec.program import Program

log = logging.getLogger("sparsec")


def install_kernels(module: GraphModule, dense: bool = False, tokens: TokenRange | None = None) -> GraphModule:
    """Replace every call on packed tables by this machine's kernel on one stream, or by a dense weight.

    `tokens`: what the layers are declared to see; where `cost` says that dense is faster then, dense it is.
    """
    slow = cache(too_slow)  # layers repeat: each shape is decided once
    for call in packed_calls(module):
        if call.view is None and rounds_activations(call.layout) and library.level() is None and not dense:
            continue  # what the model computes has its activations rounded too: the portable operator does that
        runs_here, stored = has_kernel(call) and not dense, cast("Values", call.layout.stored)
        if runs_here and library.level() is None:
            say_once(library.unavailable_reason() or "the kernels are switched off")
        elif runs_here and not slow(call.layout.shape, call.layout.pattern, stored, tokens):
            _install_stream(module, call)
            continue
        run_dense(module, call)
    fuse_activations(module)
    _fx.prune_unused(module)
    module.graph.lint()
    module.recompile()
    return module


def _install_stream(module: GraphModule, call: PackedCall) -> None:
    node, name = call.node, f"{call.site}_stream"
    if not _fx.has_tensor(module, name):  # a shared weight is packed once
        _fx.set_tensor(module, name, int8.pack(call.layout) if call.layout.stored == "int8" else pack(call.layout))
    args = (node.args[0], _fx.attribute(module, name, node), node.args[4], call.layout.shape[1])
    product = int8.int8_linear if call.layout.stored == "int8" else stream_linear
    _fx.replace(node, _fx.call(node, product, args, node.meta[_fx.TYPE], product.__name__))


def absorbed(program: Program) -> dict[str, str]:
    """The activations of an unlowered program that kernels would apply themselves: node -> its layer's site."""
    module = program.clone().module
    owner: dict[Node, str] = {}
    for site in program.sites:
        if not site.eligible or not lowers_to_linear(module, site):
            continue
        for user in site.users:
            node = _fx.find(module, user)
            x = node.args[1 if operation(node) == "addmm" else 0]
            args = (x, _fx.attribute(module, site.name, node), None, site.shape[1])  # any stream: nothing runs
            new = _fx.call(node, stream_linear, args, node.meta[_fx.TYPE], user)
            _fx.replace(node, new)
            owner[_fx.find(program.module, user)] = site.name
    fuse_activations(module)
    _fx.prune_unused(module)
    left = {node.name for node in module.graph.nodes}
    gone = {}
    for node in program.module.graph.nodes:
        sites = [owner[read] for read in node.all_input_nodes if read in owner]
        if sites and node not in owner and node.name not in left:
            owner[node] = gone[node.name] = sites[0]
        elif sites and operation(node) in ("view", "reshape"):
            owner[node] = sites[0]
    return gone


@cache
def say_once(reason: str) -> None:
    """Why no sparse kernel runs here, once in a process."""
    log.warning("sparse weights run on the dense reference path, at dense speed: %s", reason)
