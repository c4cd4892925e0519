"""What a layer of an .onnx file does, from the graph alone: the roles of `sparsec.roles` that stay dense by default.

A head's result becomes an output of the graph, through nothing but its bias, a change of shape or type, or a softmax;
before it there is another layer. Names are never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsec.onnxfile.scopes import Reader, Scope
from sparsec.view import WeightView

_RESHAPES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Identity Cast QuantizeLinear DequantizeLinear".split()
)
_SELECTS = frozenset({"Gather", "Slice", "GatherND"})
_ENDS = frozenset({"Softmax", "LogSoftmax", "Sigmoid"})
_PRODUCTS = frozenset({"Gemm", "MatMul", "Conv"})


def role(scope: Scope, node: Any, weight_at: int, view: WeightView) -> str:
    """The role of the layer that a node is, whose weight is input `weight_at`, seen as `view`."""
    other = node.input[1 - weight_at]
    source = _back(scope, other)
    if node.op_type == "Conv":
        depthwise = view.batch > 1 and view.parameter[1] == 1
        return "depthwise" if depthwise else "patch embedding" if source in scope.inputs else "convolution"
    if _ends_in_output(scope, node.output[0]) and _after_a_layer(scope, other):
        return "head"
    following = [reader.node.op_type for reader in _forward(scope, node.output[0], frozenset())]
    maker = scope.makers.get(source)
    if maker is not None and maker.op_type in _SELECTS and "Tanh" in following:
        return "pooler"
    if "TopK" in [reader.node.op_type for reader in _forward(scope, node.output[0], _ENDS)]:
        return "router"
    return "linear"


def _forward(scope: Scope, name: str, through: frozenset[str]) -> Iterator[Reader]:
    """The first readers of a value that do more than change its shape, add a constant, or are in `through`."""
    for reader in scope.readers.get(name, ()):
        if _passes(reader, through):
            yield from _forward(reader.scope, reader.node.output[0], through)
        else:
            yield reader


def _passes(reader: Reader, through: frozenset[str]) -> bool:
    node = reader.node
    if node.op_type == "Add":
        return all(reader.scope.constant(name) is not None for i, name in enumerate(node.input) if i != reader.at)
    return node.op_type in _RESHAPES | through


def _ends_in_output(scope: Scope, name: str) -> bool:
    """Whether a value, or what its shape and a softmax make of it, is an output and nothing else."""
    readers = scope.readers.get(name, ())
    if not readers:
        return name in scope.outputs
    return all(
        _passes(reader, _ENDS | _SELECTS) and _ends_in_output(reader.scope, reader.node.output[0]) for reader in readers
    )


def _back(scope: Scope, name: str) -> str:
    """The first value, along first inputs, that is not another's shape or type changed."""
    while (maker := scope.makers.get(name)) is not None and maker.op_type in _RESHAPES and maker.input:
        name = maker.input[0]
    return name


def _after_a_layer(scope: Scope, name: str) -> bool:
    """Whether a value is computed from the result of another product with a constant."""
    seen, queue = {name}, [name]
    while queue:
        node = scope.makers.get(queue.pop())
        if node is None:
            continue
        if node.op_type in _PRODUCTS and any(scope.constant(_back(scope, one)) is not None for one in node.input[:2]):
            return True
        fresh = [one for one in node.input if one not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return any(one.domain == "sparsec" for one in scope.nodes)
