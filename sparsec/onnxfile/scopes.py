"""Who reads which value: the graph of a file, the graphs inside its If, Loop and Scan nodes, and its functions.

1. A name belongs to the innermost graph that defines it; an inner graph reads the names of the graphs around it.
2. A constant is an initializer or the `value` of a Constant node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Reader(NamedTuple):
    """A node that reads a value, at which of its inputs, and the scope that it stands in."""

    node: Any
    at: int
    scope: Scope


@dataclass(eq=False)
class Scope:
    """One graph. `where`: empty for the main graph, else such as `inside If 'if_1'`."""

    where: str
    nodes: list[Any]
    parent: Scope | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    """Name -> its TensorProto (rule 2)."""
    makers: dict[str, Any] = field(default_factory=dict)
    """Name -> the node that gives it."""
    readers: dict[str, list[Reader]] = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()
    outputs: set[str] = field(default_factory=set)
    """Names that this graph gives, or one inside it."""

    def owner(self, name: str) -> Scope | None:
        """The scope that defines a name (rule 1), or None."""
        if name in self.constants or name in self.makers or name in self.inputs:
            return self
        return self.parent.owner(name) if self.parent else None

    def constant(self, name: str) -> Any:
        """The TensorProto of a name, or None where it is computed."""
        owner = self.owner(name)
        return owner.constants.get(name) if owner else None


def label(node: Any) -> str:
    """What to call a node: its name, or what it gives."""
    return str(node.name or next(iter(node.output), node.op_type))


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    import onnx

    found = next((one for one in node.attribute if one.name == name), None)
    return default if found is None else onnx.helper.get_attribute_value(found)


def scopes_of(model: Any) -> tuple[Scope, list[Scope]]:
    """The main graph, and all other graphs of a model."""
    main = _scope("", model.graph.node, model.graph.initializer, _names(model.graph.input), None)
    every = [main, *_inner(main)]
    _link(main, every, _names(model.graph.output))
    for function in model.functions:
        where = f"inside the function {function.domain}::{function.name}"
        outer = _scope(where, function.node, (), frozenset(function.input), None)
        found = [outer, *_inner(outer)]
        _link(outer, found, frozenset(function.output))
        every += found
    return main, every[1:]


def _names(values: Iterable[Any]) -> frozenset[str]:
    return frozenset(value.name for value in values)


def _scope(where: str, nodes: Iterable[Any], tensors: Iterable[Any], inputs: frozenset[str], parent: Any) -> Scope:
    scope = Scope(where, list(nodes), parent, inputs=inputs)
    scope.constants |= {tensor.name: tensor for tensor in tensors}
    for node in scope.nodes:
        scope.makers |= dict.fromkeys(filter(None, node.output), node)
        value = attribute(node, "value") if node.op_type == "Constant" and not node.domain else None
        if value is not None:
            scope.constants[node.output[0]] = value
    return scope


def _inner(scope: Scope) -> Iterator[Scope]:
    """The graphs inside a graph's nodes; what they give is given by the graph around them."""
    for node in scope.nodes:
        for one in node.attribute:
            for graph in ([one.g] if one.HasField("g") else []) + list(one.graphs):
                where = f"inside {node.op_type} {label(node)!r}"
                inner = _scope(where, graph.node, graph.initializer, _names(graph.input), scope)
                inner.outputs = set(_names(graph.output))
                yield inner
                yield from _inner(inner)


def _link(main: Scope, every: list[Scope], outputs: frozenset[str]) -> None:
    main.outputs = set(outputs)
    for scope in every:
        for node in scope.nodes:
            for index, name in enumerate(node.input):
                if name and (owner := scope.owner(name)):
                    owner.readers.setdefault(name, []).append(Reader(node, index, scope))
        for name in list(scope.outputs):
            if owner := scope.owner(name):
                owner.outputs.add(name)
