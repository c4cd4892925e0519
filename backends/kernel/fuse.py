"""Let each sparse linear layer apply the activation behind it: y = activation(x @ weight.T + bias) in one pass over y.

1. What follows the layer must be relu, gelu (erf or tanh) or silu, as one operator or written out in arithmetic, such
   as x * sigmoid(x) or the tanh form of GPT-2. Views of the layer's result may stand between.
2. No one else may read the layer's result.
3. Arithmetic is recognised by what it computes, not by how it is written: from smooth operators only, equal to the
   activation at `_probe` in float64. So every order of factors and every way to write a constant counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn import functional

from sparsec import _fx
from sparsec.backends.kernel.cpu.int8 import int8_linear
from sparsec.backends.kernel.cpu.linear import Activation, stream_linear
from sparsec.backends.kernel.cuda.linear import panel_linear

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

_aten = torch.ops.aten
_VIEWS = {_aten.view.default, _aten.reshape.default}
# Smooth, so that two formulas that agree on the probe do not part elsewhere: no clamp, no comparison.
_SMOOTH = {
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.neg.default, _aten.pow.Tensor_Scalar,
    _aten.square.default, _aten.tanh.default, _aten.sigmoid.default, _aten.erf.default, _aten.gelu.default,
    _aten.silu.default,
}  # fmt: skip
# How many a call without activation has: x, stream, bias, out_features; on a GPU the pattern too.
_ARGUMENTS: dict[Callable[..., Any], int] = {stream_linear: 4, int8_linear: 4, panel_linear: 5}
_LONGEST = 12  # operators of one written-out activation; the longest in use, BLOOM's, has 9
_SAME = 2.0**-23  # of the value, or of 1: constants are written with the digits of float32


def fuse_activations(module: GraphModule) -> int:
    """Give every call of a kernel in the graph the activation behind it; returns how many there were.

    Nodes that lose their users stay: `_fx.prune_unused` takes them away.
    """
    fused = 0
    for linear in [node for kernel in _ARGUMENTS for node in _fx.calls(module.graph, kernel)]:
        if len(linear.args) > _ARGUMENTS[linear.target]:  # type: ignore[index]
            continue  # it has its activation
        found = activation_behind(linear)
        if found is None:
            continue
        _fx.replace(found.end, found.result)
        args = (*linear.args, found.name)
        _fx.replace(linear, _fx.call(linear, linear.target, args, linear.meta[_fx.TYPE], linear.name))  # type: ignore[arg-type]
        fused += 1
    return fused


class Behind(NamedTuple):
    """An activation that a layer could apply itself."""

    result: Node
    """The last view of the layer's result."""
    end: Node
    """The last node of the activation."""
    name: Activation
    operators: int
    """That the activation is written in."""


def activation_behind(linear: Node) -> Behind | None:
    """The activation behind a layer, by the rules above."""
    source = linear
    while len(source.users) == 1 and (user := next(iter(source.users))).target in _VIEWS:
        source = user
    users = list(source.users)
    if len(users) == 1 and users[0].target == _aten.relu.default:
        return Behind(source, users[0], "relu", 1)
    values: dict[Node, Tensor] = {source: _probe()}
    while len(values) <= _LONGEST:
        node = next((user for known in values for user in known.users if _follows(user, values)), None)
        if node is None:
            return None
        values[node] = _evaluate(node, values)
        read_outside = [known for known in values if not values.keys() >= known.users.keys()]
        if read_outside == [node] and (activation := _named(values[node])):
            return Behind(source, node, activation, len(values) - 1)
    return None


def _follows(node: Node, values: dict[Node, Tensor]) -> bool:
    """Whether it is new, smooth, and reads known values and numbers only."""
    return node not in values and node.target in _SMOOTH and all(read in values for read in node.all_input_nodes)


def _evaluate(node: Node, values: dict[Node, Tensor]) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _named(value: Tensor) -> Activation | None:
    for name, expected in _expected().items():
        if bool(((value - expected).abs() <= _SAME * expected.abs().clamp(min=1.0)).all()):
            return name
    return None


@cache
def _probe() -> Tensor:
    """Where formulas are compared: densely around zero, and over all magnitudes that activations take."""
    far = torch.logspace(-6, 4, 400, dtype=torch.float64)
    return torch.cat([torch.linspace(-12, 12, 2001, dtype=torch.float64), far, -far])


@cache
def _expected() -> dict[Activation, Tensor]:
    x = _probe()
    return {
        "gelu": functional.gelu(x),
        "gelu_tanh": functional.gelu(x, approximate="tanh"),
        "silu": functional.silu(x),
    }
