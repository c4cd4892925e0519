"""Writes in place, in the graph that torch.export gives: what they change, and what takes their place.

1. A write becomes its functional twin, and whoever reads the tensor later reads the twin's value.
2. A write to a part (`x[:, 0] = 0`) is also put back into the whole, where that is read later.
3. What an input or parameter would notice, or a view that was made before the write, is refused by the module's name.
"""

from __future__ import annotations

import itertools
from operator import getitem
from typing import TYPE_CHECKING, Any

from sparsec.errors import TraceError

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

SCATTER = {"slice": "aten.slice_scatter.default", "select": "aten.select_scatter.default"}


def is_write(node: Node) -> bool:
    """Whether a call changes one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def functional_twin(node: Node) -> Any:
    """`aten.relu` for `aten.relu_`; TraceError where there is none."""
    import torch

    namespace, operation, overload = str(node.target).split(".")
    twin = getattr(getattr(torch.ops.aten, operation.removesuffix("_"), None), overload, None)
    if namespace != "aten" or not operation.endswith("_") or twin is None:
        raise _refused(node)
    return twin


def scattered(node: Node) -> list[tuple[Node, Node]]:
    """(view, its base) upwards from the tensor written to, as far as a base is read later; else TraceError."""
    order = {each: i for i, each in enumerate(node.graph.nodes)}
    chain = [written(node)]
    while (base := _base(chain[-1])) is not None:
        chain.append(base)
    family = _family(chain[-1])
    read = {each for each in family if any(order[user] > order[node] for user in _readers(each))}
    if chain[-1].op != "call_function" or any(
        each in read and each not in chain and order[each] < order[node] for each in family
    ):
        raise _refused(node)
    top = max((i for i, each in enumerate(chain) if each in read), default=0)
    steps = list(itertools.pairwise(chain[: top + 1]))
    if any(str(view.target).split(".")[1] not in SCATTER for view, _ in steps):
        raise _refused(node)
    return steps


def _refused(node: Node) -> TraceError:
    where = scope(node) or "the model"
    return TraceError(
        f"{where} writes into a tensor in place ({node.target}) that is also read under another name; build the "
        "result with torch.where or torch.cat"
    )


def written(node: Node) -> Node:
    """The tensor that a chain of writes wrote to: `x` for `x.add_(1).mul_(2)`."""
    while is_write(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _base(node: Node) -> Node | None:
    """The tensor that a node is a view of."""
    if node.target is getitem:
        producer: Node = node.args[0]  # type: ignore[assignment]
        return _base(producer)
    return written(node.args[0]) if _is_view(node) else None  # type: ignore[arg-type]


def _readers(node: Node) -> list[Node]:
    """Who reads a tensor, also as the result of a write to it; writes are readers too."""
    found = []
    for user in node.users:
        found += [user, *(_readers(user) if is_write(user) and user.args[0] is node else [])]
    return found


def _family(base: Node) -> list[Node]:
    """A tensor and all views of it."""
    family = [base]
    for node in family:
        family += [user for user in _readers(node) if user not in family and _base(user) is not None]
    return family


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    aliases = schema is not None and not schema.is_mutable and any(result.alias_info for result in schema.returns)
    if aliases and str(node.target).startswith("aten.to."):
        return bool(node.meta["val"].dtype == node.args[0].meta["val"].dtype)
    return aliases or str(node.target) == "aten.dropout.default"  # in eval mode it returns its input


def promoted(node: Node) -> torch.dtype | None:
    """The wider dtype that a twin gives where a write keeps the dtype of what it writes to."""
    import torch

    schema = node.target._schema
    values = [node.args[0].meta["val"], getattr(node.args[1], "meta", {}).get("val")] if len(node.args) > 1 else []
    if len(values) < 2 or schema.arguments[1].name != "other" or not isinstance(values[1], torch.Tensor):
        return None
    dtype = torch.result_type(*values)
    return dtype if dtype != values[0].dtype else None


def scope(node: Node) -> str:
    """The name of the module that a node of the exported graph comes from; empty for the model itself."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    name = str(stack[-1][0]) if stack else ""
    return "" if name.startswith("_empty") else name
