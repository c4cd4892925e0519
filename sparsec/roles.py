"""Find the sites of a graph and what each layer does, from the graph alone; names are never looked at.

1. A 2-D parameter that feeds `aten.linear` is a site. Every other parameter is listed with the reason it is none.
2. Roles follow the data: through reshapes, dropout and sums of rotary embeddings to attention, an activation, or the
   graph's outputs.
3. Heads (a last linear whose output is the model's output) and poolers (a linear on one selected token, then tanh)
   stay dense by default: they are small, and the most sensitive.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.sites import Exclusion, Site, SiteTable

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

_RESHAPES = frozenset(
    """
    view reshape transpose permute contiguous clone dropout expand unsqueeze squeeze flatten unflatten to alias
    detach repeat_interleave chunk split split_with_sizes unbind
    """.split()
)
_SELECTS = frozenset({"select", "index", "slice"})
_ROTARY = frozenset({"mul", "add", "neg", "cat", "slice", "stack"})
_ACTIVATIONS = frozenset(
    """
    gelu relu silu tanh sigmoid mish elu selu leaky_relu hardswish relu6 prelu
    """.split()
)
_ATTENTION_INPUTS = {0: "attention.query", 1: "attention.key", 2: "attention.value"}
EXCLUDED_ROLES = {
    "head": "the model's output layer (role head): small and sensitive; include it with --layer",
    "pooler": "the pooler (role pooler): small and sensitive; include it with --include-pooler",
}


def find_sites(module: GraphModule, aliases: dict[str, tuple[str, ...]]) -> SiteTable:
    """The site table of a freshly traced module. `aliases`: other names of tied parameters, by their first name."""
    import torch

    linears = list(_fx.calls(module.graph, torch.ops.aten.linear.default))
    by_weight: dict[str, list[Node]] = {}
    for node in linears:
        if name := _fx.weight_name(node):
            by_weight.setdefault(name, []).append(node)
    readers = _readers(module)
    sites, exclusions = [], []
    for name, parameter in module.named_parameters():
        other = [node for node in readers.get(name, []) if node not in by_weight.get(name, [])]
        if name in by_weight and parameter.dim() == 2 and not other:
            role = _role(by_weight[name][0], linears)
            users = tuple(node.name for node in by_weight[name])
            shape = (1, parameter.shape[0], parameter.shape[1])
            sites.append(
                Site(name, shape, users, role, aliases=aliases.get(name, ()), excluded=EXCLUDED_ROLES.get(role))
            )
        else:
            exclusions.append(_exclusion(name, parameter.dim(), other or readers.get(name, [])))
    order = {node.name: i for i, node in enumerate(module.graph.nodes)}
    return SiteTable(tuple(sorted(sites, key=lambda site: order[site.users[0]])), tuple(exclusions))


def _exclusion(name: str, dims: int, readers: list[Node]) -> Exclusion:
    operations = sorted({_operation(node) for node in readers})
    if "embedding" in operations:
        return Exclusion(name, "embedding", "an embedding table: it is looked up, not multiplied")
    if dims < 2:
        scales = any("norm" in operation or operation == "mul" for operation in operations)
        role = "norm" if scales else "bias"
        return Exclusion(name, role, f"a vector ({role}): nothing to make sparse")
    used = ", ".join(operations) or "nothing"
    return Exclusion(name, "other", f"used by {used}: only weights of aten.linear are made sparse")


def _role(node: Node, linears: list[Node]) -> str:
    upstream = _reaches_any(node.all_input_nodes[:1], set(linears) - {node})
    if upstream and _ends_in_output(node):
        return "head"
    if _takes_one_token(node) and any(_operation(user) == "tanh" for user in node.users):
        return "pooler"
    for user, position in _forward(node, _RESHAPES | _ROTARY):
        if _operation(user) == "scaled_dot_product_attention" and position in _ATTENTION_INPUTS:
            return _ATTENTION_INPUTS[position]
    source = _back(node.args[0], _RESHAPES)  # type: ignore[arg-type]
    if _operation(source) == "scaled_dot_product_attention":
        return "attention.output"
    for user, _ in _forward(node, _RESHAPES):
        if _operation(user) in _ACTIVATIONS:
            return "ffn.gate" if any(_operation(then) == "mul" for then in user.users) else "ffn.up"
        if _operation(user) == "mul" and any(_operation(arg) in _ACTIVATIONS for arg in user.all_input_nodes):
            return "ffn.up"
    if _operation(source) in _ACTIVATIONS | {"mul"}:
        return "ffn.down"
    return "linear"


def _operation(node: Node) -> str:
    """`linear` for aten.linear.default; the op kind for nodes that are no calls."""
    target = node.target
    return str(target).split(".")[1] if node.op == "call_function" and "." in str(target) else node.op


def _forward(node: Node, through: frozenset[str]) -> Iterable[tuple[Node, int]]:
    """The first users that are not in `through`, each with the argument position the value arrives at."""
    seen, queue = {node}, [node]
    while queue:
        value = queue.pop()
        for user in value.users:
            if _operation(user) not in through and user.target is not getitem:
                yield user, next((i for i, arg in enumerate(user.args) if arg is value), -1)
            elif user not in seen:
                seen.add(user)
                queue.append(user)


def _back(node: Node, through: frozenset[str]) -> Node:
    """The first producer, along first arguments, that is not in `through`."""
    while _operation(node) in through or node.target is getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _ends_in_output(node: Node) -> bool:
    return all(user.op == "output" for user, _ in _forward(node, _RESHAPES | _SELECTS))


def _takes_one_token(node: Node) -> bool:
    return _operation(_back(node.args[0], _RESHAPES)) in _SELECTS  # type: ignore[arg-type]


def _reaches_any(nodes: Iterable[Node], targets: set[Node]) -> bool:
    seen, queue = set(nodes), list(nodes)
    while queue:
        value = queue.pop()
        if value in targets:
            return True
        fresh = [node for node in value.all_input_nodes if node not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False


def _readers(module: GraphModule) -> dict[str, list[Node]]:
    readers: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).extend(node.users)
    return readers
