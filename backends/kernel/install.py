"""Put this machine's kernels in place of the calls on packed tables, when an artifact is loaded."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from sparsec import _fx
from sparsec.backends.kernel.calls import SparseCall, sparse_calls
from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.backends.kernel.fuse import fuse_activations
from sparsec.layout import decompress
from sparsec.ops import rounds_activations

if TYPE_CHECKING:
    from torch.fx import GraphModule

log = logging.getLogger("sparsec")


def install_kernels(module: GraphModule, dense: bool = False) -> GraphModule:
    """Replace every call on packed tables by this machine's kernel on one stream, or by a dense weight."""
    for call in sparse_calls(module):
        if call.view is None and rounds_activations(call.layout) and library.level() is None and not dense:
            continue  # what the model computes has its activations rounded too: the portable operator does that
        if call.has_kernel and library.level() is not None and not dense:
            _install_stream(module, call)
            continue
        if call.has_kernel and not dense:
            _say_once(library.unavailable_reason() or "the kernels are switched off")
        _install_dense(module, call)
    fuse_activations(module)
    _fx.prune_unused(module)
    module.graph.lint()
    module.recompile()
    return module


def _install_stream(module: GraphModule, call: SparseCall) -> None:
    node, name = call.node, f"{call.site}_stream"
    if not _fx.has_tensor(module, name):  # a shared weight is packed once
        _fx.set_tensor(module, name, int8.pack(call.layout) if call.layout.stored == "int8" else pack(call.layout))
    args = (node.args[0], _fx.attribute(module, name, node), node.args[4], call.layout.shape[1])
    product = int8.int8_linear if call.layout.stored == "int8" else stream_linear
    _fx.replace(node, _fx.call(node, product, args, node.meta[_fx.TYPE], product.__name__))


def _install_dense(module: GraphModule, call: SparseCall) -> None:
    node, name = call.node, f"{call.site}_dense"
    if not _fx.has_tensor(module, name):
        weight = decompress(call.layout, call.dtype)
        _fx.set_tensor(module, name, weight[0] if call.view is None else call.view.to_parameter(weight))
    new = weight_node = _fx.attribute(module, name, node)
    if call.view is None:
        args = (node.args[0], weight_node, node.args[4])
        new = _fx.call(node, torch.ops.aten.linear.default, args, node.meta[_fx.TYPE], "linear")
    _fx.replace(node, new)


@cache
def _say_once(reason: str) -> None:
    log.warning("sparse weights run on the dense reference path, at dense speed: %s", reason)
