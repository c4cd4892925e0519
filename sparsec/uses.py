"""How the graph computes with each parameter: followed from where it is read to the operators that multiply it.

A parameter may reach its operator through transposes, a cast, a mask's `where`, or cut in parts (stacked q, k and v).
What the follower does not know ends the trail: the parameter is then no site, and the operator is named in the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.view import WeightView

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from sparsec.sites import Site

_SAME = frozenset({"to", "contiguous", "clone", "detach", "alias", "dropout", "where", "type_as", "_to_copy"})
_SWAPS = frozenset({"t", "transpose", "permute", "numpy_T"})
_PARTS = frozenset({"split", "split_with_sizes", "chunk", "slice", "narrow", "unbind", "select"})
ON_TRAIL = _SAME | _SWAPS | _PARTS | {"getitem"}
"""What may stand between a parameter and the operator that multiplies it."""


@dataclass(frozen=True)
class Use:
    """One operator that reads a parameter, directly or at the end of a trail."""

    node: Node
    kind: str
    """linear, conv1d_hf ([in, out] weight), matmul, einsum, conv1d, conv2d, experts, embedding; or what it is."""
    view: WeightView | None = None
    """How the operator multiplies the parameter; None when it does not."""
    rows: int = 0
    """How many of the parameter's rows the operator reads, where it does not read all."""


def operation(node: Node) -> str:
    """`linear` for aten.linear.default, `getitem` for Python's; the op kind for nodes that are no calls."""
    if node.target is getitem:
        return "getitem"
    target = str(node.target)
    return target.split(".")[1] if node.op == "call_function" and "." in target else node.op


def uses(reads: list[Node], parameter: Tensor) -> list[Use]:
    """All uses of a parameter that the get_attr nodes `reads` read."""
    shape = tuple(parameter.shape)
    found: list[Use] = []
    for read in reads:
        found += _follow(read, tuple(range(len(shape))), shape, False)
    return _stacked(found, shape)


def lowers_to_linear(module: GraphModule, site: Site) -> bool:
    """Whether every reader of the site's parameter is one plain product with it: linear, or addmm, mm on [in, out]."""
    kinds = {"linear": ("linear", 1), "addmm": ("conv1d_hf", 2), "mm": ("conv1d_hf", 1)}
    for read in _fx.reads(module, site.name):
        for user in read.users:
            kind, position = kinds.get(operation(user), ("", -1))
            if kind != site.kind or user.kwargs or user.args[position] is not read:
                return False
    return site.shape[0] == 1


def _stacked(found: list[Use], shape: tuple[int, ...]) -> list[Use]:
    """Uses of parts see the parameter as so many matrices of equal rows that no part cuts one in two."""
    parts = [use.rows for use in found if use.rows]
    if not parts or any(use.view is None for use in found):
        return found
    batch = shape[0] // math.gcd(shape[0], *parts)
    view = WeightView(tuple(range(len(shape))), shape, batch)
    return [dataclasses.replace(use, view=view) for use in found]


def _follow(node: Node, axes: tuple[int, ...], shape: tuple[int, ...], part: bool) -> Iterator[Use]:
    """Uses of a value whose dimension i is the parameter's axis axes[i]."""
    for user in node.users:
        name = operation(user)
        if name in _SAME or name == "getitem":
            yield from _follow(user, axes, shape, part)
        elif name in _SWAPS:
            yield from _follow(user, _swapped(user, axes), shape, part)
        elif name in _PARTS and user.args[0] is node and _cuts_rows(user, axes):
            yield from _follow(user, axes, shape, True)
        else:
            yield from _use(user, node, name, axes, shape, part)


def _use(
    user: Node, value: Node, name: str, axes: tuple[int, ...], shape: tuple[int, ...], part: bool
) -> Iterator[Use]:
    if name == "einsum":
        view = _einsum_view(user, value, axes, shape)
        yield Use(user, "einsum", view)
    for position, argument in enumerate(user.args):
        if argument is value:
            kind, order = _multiplies(name, position, axes, user)
            if order is None:
                yield Use(user, kind)
                continue
            groups = _groups(user) if kind in ("conv1d", "conv2d") else 1
            rows = int(value.meta[_fx.TYPE][:-1].partition("[")[2].split(",")[axes.index(0)]) if part else 0
            yield Use(user, kind, WeightView(order, shape, groups, kind == "experts"), rows)


def _multiplies(name: str, position: int, axes: tuple[int, ...], user: Node) -> tuple[str, tuple[int, ...] | None]:
    """Kind of the use, and the parameter's axes in the order (..., rows, cols); None when it does not multiply."""
    if name == "linear" and position == 1 and len(axes) == 2:
        return "linear", axes
    if name == "addmm" and position == 2 and not user.kwargs:
        return "conv1d_hf", axes[::-1]
    if name in ("mm", "matmul", "bmm") and len(axes) == 2:
        return ("matmul", axes) if position == 0 else ("conv1d_hf", axes[::-1])
    if name in ("matmul", "bmm", "expert_linear", "baddbmm") and len(axes) == 3 and position > 0:
        return "experts", (axes[0], axes[2], axes[1])
    if name in ("conv1d", "conv2d") and position == 1:
        return name, axes
    return name, None


def _einsum_view(node: Node, weight: Node, axes: tuple[int, ...], shape: tuple[int, ...]) -> WeightView | None:
    """Rows are the letters that stay, cols those that are summed; None where a letter is in both operands and stays."""
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    inputs, _, output = equation.partition("->")
    letters = inputs.split(",")
    if len(operands) != 2 or not output or "." in equation:
        return None
    mine, other = letters[operands.index(weight)], letters[1 - operands.index(weight)]
    rows = [i for i, letter in enumerate(mine) if letter in output]
    cols = [i for i, letter in enumerate(mine) if letter not in output]
    if not rows or not cols or any(mine[i] in other for i in rows) or any(mine[i] not in other for i in cols):
        return None
    return WeightView(tuple(axes[i] for i in rows + cols), shape, row_axes=len(rows))


def _swapped(node: Node, axes: tuple[int, ...]) -> tuple[int, ...]:
    name = operation(node)
    arguments: Any = node.args[1:]
    if name == "permute":
        return tuple(axes[i] for i in arguments[0])
    if name == "transpose":
        order = list(axes)
        a, b = arguments
        order[a], order[b] = order[b], order[a]
        return tuple(order)
    return axes[::-1]


def _cuts_rows(node: Node, axes: tuple[int, ...]) -> bool:
    """Whether a parameter in its own axis order is cut along its first axis, the rows."""
    name = operation(node)
    at = 2 if name in ("split", "split_with_sizes", "chunk") else 1
    dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
    return dim == 0 and axes == tuple(range(len(axes)))


def _groups(node: Node) -> int:
    at = 6
    groups: Any = node.args[at] if len(node.args) > at else node.kwargs.get("groups", 1)
    return int(groups)
