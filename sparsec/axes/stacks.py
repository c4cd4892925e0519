"""Stacked projections: an axis seen as (3, heads, size) and taken apart along the 3 is cut, not split.

Query, key and value then have channels of their own, as they would after a `chunk`. This is decided by looking ahead
at the view's users: each must lead, through operators that only move axes, to a select or unbind of that dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec.axes.calls import Call, Flow, Stack, operator_name
from sparsec.axes.sizes import ONE

if TYPE_CHECKING:
    from torch.fx import Node

_VIEWS = frozenset({"view", "reshape", "unflatten"})
_LARGEST = 16  # parts; whoever takes apart more of them is picking tokens, not projections


def stacked(flow: Flow, node: Node, call: Call) -> bool:
    """Give a node its axes if it belongs to a stack: the view that makes it, a move, or what takes it apart."""
    first: Any = node.args[0] if node.args else None
    source = flow.stacks.get(first) if hasattr(first, "op") else None
    if source is None:
        return _base(node) in _VIEWS and _made(flow, node, call)
    if _base(node) == "unbind":
        parts = [dims[: source.at] + dims[source.at + 1 :] for dims in source.parts]
        flow.dims[node] = parts
        flow.scopes.extend(parts)
    elif _base(node) == "select":
        dims = source.parts[call.arguments["index"]]
        flow.dims[node] = dims[: source.at] + dims[source.at + 1 :]
        flow.scopes.append(dims)
    else:
        order = _order(node, len(source.parts[0]))
        assert order is not None
        parts = [tuple(dims[axis] if axis >= 0 else () for axis in order) for dims in source.parts]
        flow.stacks[node] = Stack(order.index(source.at), tuple(parts))
    return True


def _made(flow: Flow, node: Node, call: Call) -> bool:
    joined = tuple(atom for axis in call.tensors()[0] for atom in axis)
    for at, size in enumerate(call.shape):
        if not (size.static and 1 < size.count <= _LARGEST and _taken_apart(node, at, len(call.shape))):
            continue
        inner = call.shape[at + 1 :]
        part = ONE
        for each in inner:
            part = part * each
        if not part.static:
            continue
        *outer, whole = call.atoms.regroup(joined, [*call.shape[:at], size * part], call.why)
        call.scope(*outer)
        pieces = call.atoms.cut(whole, [part.count] * size.count, call.why)
        parts = [(*outer, (), *call.atoms.regroup(piece, inner, call.why)) for piece in pieces]
        flow.stacks[node] = Stack(at, tuple(parts))
        return True
    return False


def _taken_apart(node: Node, at: int, rank: int) -> bool:
    """Whether every use of a node ends in taking it apart along dimension `at`."""
    for user in node.users:
        if user.op != "call_function" or user.args[0] is not node or user.all_input_nodes.count(node) != 1:
            return False
        if _base(user) in ("select", "unbind"):
            dim: Any = user.args[1] if len(user.args) > 1 else user.kwargs.get("dim", 0)
            if dim % rank != at or (_base(user) == "select" and not isinstance(user.args[2], int)):
                return False
            continue
        order = _order(user, rank)
        if order is None or at not in order or not _taken_apart(user, order.index(at), len(order)):
            return False
    return bool(node.users)


def _order(node: Node, rank: int) -> list[int] | None:
    """Which dimension of its argument each dimension of a result is, -1 for a new one; None if not just a move."""
    name = _base(node)
    arguments: list[Any] = list(node.args[1:])
    order = list(range(rank))
    if node.kwargs and name != "clone":
        return None
    if name in ("contiguous", "clone"):
        return order
    if name == "permute":
        return [axis % rank for axis in arguments[0]]
    if name == "transpose":
        a, b = (axis % rank for axis in arguments)
        order[a], order[b] = order[b], order[a]
        return order
    if name == "unsqueeze":
        order.insert(arguments[0] % (rank + 1), -1)
        return order
    if operator_name(node) == "squeeze.dim":
        order.pop(arguments[0] % rank)
        return order
    return None


def _base(node: Node) -> str:
    return operator_name(node).partition(".")[0]
