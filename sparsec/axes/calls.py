"""What a rule of the channel-axis analysis sees of one operator call, and the steps that many rules share."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.axes.atoms import Atoms, Axis
from sparsec.axes.sizes import Size

if TYPE_CHECKING:
    from torch.fx import Node

Dims = tuple[Axis, ...]
"""The axes of one tensor."""
Result = Dims | list[Dims]


@dataclass
class Flow:
    """What is known so far: the axes of every node, and scopes: axes that one computation indexes together."""

    atoms: Atoms = field(default_factory=Atoms)
    dims: dict[Node, Result] = field(default_factory=dict)
    scopes: list[Dims] = field(default_factory=list)
    stacks: dict[Node, Stack] = field(default_factory=dict)


@dataclass(frozen=True)
class Stack:
    """The axes of a tensor that is only ever taken apart again along one dimension (see `stacks`)."""

    at: int
    parts: tuple[Dims, ...]
    """The axes of each part, that dimension left in with size 1."""


@dataclass(frozen=True)
class Call:
    """One node, as its rule sees it."""

    flow: Flow
    why: str
    """The node in words: the reason given for what it fixes."""
    arguments: dict[str, Any]
    """By the names of the operator's schema, defaults filled in."""
    shapes: list[tuple[Size, ...]]
    """Of the tensors that the node returns."""

    @property
    def atoms(self) -> Atoms:
        return self.flow.atoms

    @property
    def shape(self) -> tuple[Size, ...]:
        return self.shapes[0]

    def dims(self, name: str) -> Dims:
        """The axes of a tensor argument."""
        return self.dims_of(self.arguments[name])

    def dims_of(self, node: Node) -> Dims:
        """The axes of one tensor."""
        found = self.flow.dims[node]
        assert isinstance(found, tuple), f"{self.why}: found a list of tensors, expected one"
        return found

    def has(self, name: str) -> bool:
        """Whether a tensor is given for this argument."""
        return self._is_tensor(self.arguments.get(name))

    def tensors(self) -> list[Dims]:
        """The axes of all tensor arguments, lists included."""
        found: list[Dims] = []
        for value in self.arguments.values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if self._is_tensor(item):
                    known = self.flow.dims[item]
                    found.extend([known] if isinstance(known, tuple) else known)
        return found

    def _is_tensor(self, value: Any) -> bool:
        return hasattr(value, "op") and value in self.flow.dims

    def axes(self, name: str, dims: Dims) -> list[int]:
        """The dimensions that an argument names, counted from the front; all of them for None or an empty list."""
        value = self.arguments.get(name)
        if value is None or value == [] or value == ():
            return list(range(len(dims)))
        return [axis % len(dims) for axis in ([value] if isinstance(value, int) else value)] if dims else []

    def fix(self, *axes: Axis) -> None:
        for axis in axes:
            self.atoms.fix(axis, self.why)

    def unite(self, left: Axis, right: Axis) -> None:
        self.atoms.unite(left, right, self.why)

    def fixed(self, size: Size) -> Axis:
        """A new axis that may not be permuted."""
        return self.atoms.new(size, self.why)

    def scope(self, *axes: Axis) -> None:
        """State that one computation indexes these axes together."""
        self.flow.scopes.append(axes)

    def mixed(self, dims: Dims, axes: Sequence[int]) -> Dims:
        """State that elements along `axes` are mixed: what happens to the others may not depend on them."""
        self.scope(*(axis for i, axis in enumerate(dims) if i not in axes))
        return dims


Rule = Callable[[Call], Result]


def call_of(flow: Flow, node: Node) -> Call:
    """A node's call, arguments by name."""
    schema: Any = getattr(node.target, "_schema", None)
    names = schema.arguments if schema else []
    arguments = {argument.name: argument.default_value for argument in names}
    spare = [f"argument {i}" for i in range(len(names), len(node.args))]  # Python's own operators have no schema
    arguments.update(zip([*arguments, *spare], node.args, strict=False))
    return Call(flow, f"{operator_name(node)} at {node.name}", arguments | node.kwargs, shapes_of(node))


def operator_name(node: Node) -> str:
    """`softmax.int` for aten.softmax.int."""
    return str(node.target).partition(".")[2] if str(node.target).startswith("aten.") else str(node.target)


def shapes_of(node: Node) -> list[tuple[Size, ...]]:
    """The shapes in a node's type: one for a tensor, several for a list, none for a number."""
    found = re.findall(r"\w+\[([^\[\]]*)\]", str(node.meta[_fx.TYPE]))
    return [tuple(Size.parse(text) for text in _split(shape)) for shape in found]


def _split(shape: str) -> list[str]:
    """The sizes of a shape; a size such as Max(1, length) has commas of its own."""
    return [ast.unparse(size) for size in ast.parse(f"[{shape}]", mode="eval").body.elts]  # type: ignore[attr-defined]


def unknown(call: Call) -> Result:
    """Anything may happen: all is fixed."""
    for dims in call.tensors():
        call.fix(*dims)
    made = [tuple(call.fixed(size) for size in shape) for shape in call.shapes]
    return made if len(made) != 1 else made[0]


def broadcast(call: Call, tensors: Sequence[Dims]) -> Dims:
    """Unite axes position by position, counted from the last; where one has size 1, the other stands."""
    result: list[Axis] = []
    for back in range(1, max(map(len, tensors), default=0) + 1):
        paired = [dims[-back] for dims in tensors if len(dims) >= back and dims[-back]]
        for axis in paired[1:]:
            call.unite(paired[0], axis)
        result.append(paired[0] if paired else ())
    return tuple(result[::-1])


def positional(call: Call, x: Dims, axes: Sequence[int], shape: Sequence[Size]) -> Dims:
    """Fix `axes`; the result has new fixed ones there, of the sizes in `shape`."""
    call.fix(*(x[axis] for axis in axes))
    call.mixed(x, axes)
    return tuple(call.fixed(shape[i]) if i in axes else axis for i, axis in enumerate(x))


def copies(call: Call, axis: Axis, size: Size) -> Axis:
    """A new axis that counts the copies when `axis` is repeated to `size`; they are alike, so any order will do."""
    count = size.over(call.atoms.size(axis))
    if count:
        return call.atoms.new(count)
    call.fix(axis)
    return call.fixed(Size(1, ("unknown",)))
