"""Find the sites of a graph and what each layer does, from the graph alone; names are never looked at.

1. A matrix parameter that the graph multiplies in one way is a site, whatever its layout (see `uses`). Every other
   parameter is listed with the reason it is none.
2. Roles follow the data: through reshapes, dropout and sums of rotary embeddings to attention, an activation, or the
   graph's outputs.
3. Heads, poolers, routers, patch embeddings, depthwise convolutions and tied embeddings stay dense by default, each
   with its reason; naming one includes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import getitem
from typing import TYPE_CHECKING

from sparsec.sites import Exclusion, Site, SiteTable
from sparsec.uses import Use, operation, uses

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

_RESHAPES = frozenset(
    """
    view reshape transpose permute contiguous clone dropout expand unsqueeze squeeze flatten unflatten to alias
    detach repeat_interleave chunk split split_with_sizes unbind
    """.split()
)
_SELECTS = frozenset({"select", "index", "slice"})
_ARITHMETIC = frozenset({"mul", "add", "sub", "div", "pow"})  # what an activation may be spelled with
_ROTARY = frozenset({"mul", "add", "neg", "cat", "slice", "stack"})
_SCORES = frozenset({"mul", "div", "add", "masked_fill", "where", "sub"})  # between q k^T and its softmax
_SOFTMAX = frozenset({"softmax", "_softmax"})
_ACTIVATIONS = frozenset(
    """
    gelu relu silu tanh sigmoid mish elu selu leaky_relu hardswish relu6 prelu erf
    """.split()
)
_PRODUCTS = frozenset({"matmul", "bmm", "baddbmm"})
_ATTENTION = "scaled_dot_product_attention"
_ATTENTION_INPUTS = {0: "attention.query", 1: "attention.key", 2: "attention.value"}
EXCLUDED_ROLES = {
    "head": "the model's output layer (role head): small and sensitive; include it with --layer",
    "pooler": "the pooler (role pooler): small and sensitive; include it with --include-pooler",
    "router": "routes tokens to experts (role router): small and sensitive; include it with --layer",
    "patch embedding": "reads the model's input (role patch embedding): small and sensitive; include it with --layer",
    "depthwise": "a depthwise convolution: each output sees one input channel; include it with --layer",
    "tied embedding": "also the embedding table that tokens are looked up in; include it with --layer",
}


def find_sites(module: GraphModule, aliases: dict[str, tuple[str, ...]]) -> SiteTable:
    """The site table of a freshly traced module. `aliases`: other names of tied parameters, by their first name."""
    reads: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            reads.setdefault(str(node.target), []).append(node)
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    sites: list[tuple[int, Site]] = []
    exclusions = []
    found = {name: uses(reads.get(name, []), parameter) for name, parameter in module.named_parameters()}
    weights = {use.node for each in found.values() for use in each if use.view is not None}
    for name, parameter in module.named_parameters():
        multiplied = [use for use in found[name] if use.view is not None]
        if reason := _no_site(parameter, found[name]):
            exclusions.append(Exclusion(name, _kind_of_rest(parameter, found[name]), reason))
            continue
        role = _role(multiplied, weights, len(multiplied) < len(found[name]))
        users = tuple(dict.fromkeys(use.node.name for use in multiplied))
        view = multiplied[0].view
        assert view is not None
        site = Site(name, view, users, role, multiplied[0].kind, aliases.get(name, ()), EXCLUDED_ROLES.get(role))
        sites.append((order[multiplied[0].node], site))
    return SiteTable(tuple(site for _, site in sorted(sites, key=lambda entry: entry[0])), tuple(exclusions))


def _no_site(parameter: Tensor, found: list[Use]) -> str | None:
    """Why a parameter is no site, or None (rule 1)."""
    if parameter.dim() < 2:
        return f"a vector ({_kind_of_rest(parameter, found)}): nothing to make sparse"
    views = {use.view for use in found if use.view is not None}
    rest = sorted({use.kind for use in found if use.view is None})
    if not views and rest == ["embedding"]:
        return "an embedding table: it is looked up, not multiplied"
    if not views or (rest and rest != ["embedding"]):
        return f"used by {', '.join(rest) or 'nothing'}: only weights that the graph multiplies are made sparse"
    if len(views) > 1:
        return "multiplied in two ways (rows in one place, columns in another): no pattern fits both"
    return None


def _kind_of_rest(parameter: Tensor, found: list[Use]) -> str:
    """Role of a parameter that is no site."""
    kinds = {use.kind for use in found}
    if "embedding" in kinds:
        return "embedding"
    if parameter.dim() >= 2:
        return "other"
    return "norm" if any("norm" in kind or kind == "mul" for kind in kinds) else "bias"


def _role(multiplied: list[Use], weights: set[Node], tied: bool) -> str:
    """What a layer does (rule 2); one that serves several inputs of attention is `attention.qkv`."""
    roles = list(dict.fromkeys(_role_of(use, weights, tied) for use in multiplied))
    several = len(roles) > 1 and any(role.startswith("attention.") for role in roles)
    return "attention.qkv" if several else roles[0]


def _role_of(use: Use, weights: set[Node], tied: bool) -> str:
    node, source = use.node, _back(_input(use), _RESHAPES)
    if tied:
        return "tied embedding"
    if use.kind in ("conv1d", "conv2d"):
        return _convolution_role(use, source)
    if use.kind == "experts":
        return "expert"
    if _reaches([_input(use)], weights - {node}) and _ends_in_output(node):
        return "head"
    if operation(source) in _SELECTS and any(operation(user) == "tanh" for user in node.users):
        return "pooler"
    if any(operation(user) == "topk" for user, _ in _forward(node, _RESHAPES | _SOFTMAX | {"sigmoid", "add"})):
        return "router"
    return _attention_role(node, source) or _ffn_role(node, source) or "linear"


def _convolution_role(use: Use, source: Node) -> str:
    assert use.view is not None
    if use.view.parameter[1] == 1 and use.view.batch > 1:
        return "depthwise"
    return "patch embedding" if source.op == "placeholder" else "convolution"


def _attention_role(node: Node, source: Node) -> str | None:
    served = set()
    for user, position in _forward(node, _RESHAPES | _ROTARY):
        if operation(user) == _ATTENTION and position in _ATTENTION_INPUTS:
            served.add(_ATTENTION_INPUTS[position])
    for user, position in _forward(node, _RESHAPES | {"mul", "div"}):
        if operation(user) in _PRODUCTS and position in (0, 1):
            if _from_softmax(user):
                served.add("attention.value")
            elif any(operation(then) in _SOFTMAX for then, _ in _forward(user, _RESHAPES | _SCORES)):
                served.add(_ATTENTION_INPUTS[position])
    if served:
        return served.pop() if len(served) == 1 else "attention.qkv"
    if operation(source) == _ATTENTION or (operation(source) in _PRODUCTS and _from_softmax(source)):
        return "attention.output"
    return None


def _from_softmax(product: Node) -> bool:
    return any(operation(_back(operand, _RESHAPES)) in _SOFTMAX for operand in product.all_input_nodes)


def _ffn_role(node: Node, source: Node) -> str | None:
    for user, _ in _forward(node, _RESHAPES | _ARITHMETIC):
        if operation(user) in _ACTIVATIONS:
            gates = any(operation(then) == "mul" and _other_is_linear(then, user) for then in user.users)
            return "ffn.gate" if gates else "ffn.up"
    for user in node.users:
        if operation(user) == "mul" and any(_activated(operand) for operand in user.all_input_nodes):
            return "ffn.up"
    return "ffn.down" if _activated(source) else None


def _other_is_linear(product: Node, known: Node) -> bool:
    return any(
        operation(_back(arg, _RESHAPES)) in ("linear", "addmm") for arg in product.all_input_nodes if arg is not known
    )


def _activated(node: Node, depth: int = 5) -> bool:
    """Whether a value is an activation's, maybe one spelled with arithmetic (gelu as tanh), or gated by one."""
    if operation(node) in _ACTIVATIONS:
        return True
    inside = operation(node) in _ARITHMETIC | _RESHAPES and depth > 0
    return inside and any(_activated(operand, depth - 1) for operand in node.all_input_nodes)


def _input(use: Use) -> Node:
    """The operand of a weight's operator that is not the weight."""
    arguments = use.node.all_input_nodes
    if operation(use.node) == "addmm":
        return use.node.args[1]  # type: ignore[return-value]
    if use.kind == "matmul":
        return arguments[1]
    return arguments[0]


def _forward(node: Node, through: frozenset[str]) -> Iterator[tuple[Node, int]]:
    """The first users that are not in `through`, each with the argument position the value arrives at."""
    seen, queue = {node}, [node]
    while queue:
        value = queue.pop()
        for user in value.users:
            if operation(user) not in through and user.target is not getitem:
                yield user, next((i for i, arg in enumerate(user.args) if arg is value), -1)
            elif user not in seen:
                seen.add(user)
                queue.append(user)


def _back(node: Node, through: frozenset[str]) -> Node:
    """The first producer, along first arguments, that is not in `through`."""
    while operation(node) in through or node.target is getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _ends_in_output(node: Node) -> bool:
    return all(user.op == "output" for user, _ in _forward(node, _RESHAPES | _SELECTS))


def _reaches(nodes: Iterable[Node], targets: set[Node]) -> bool:
    """Whether any of the nodes, or what they are computed from, is a target."""
    seen, queue = set(nodes), list(nodes)
    while queue:
        value = queue.pop()
        if value in targets:
            return True
        fresh = [node for node in value.all_input_nodes if node not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return False
