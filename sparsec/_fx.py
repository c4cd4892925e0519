"""Every edit of a torch.fx graph that passes and backends make, so that each node stays typed and named.

A node's type is text, such as `float32[batch, length, 384]`, `int` for a size, or a bracketed list of types.
Parameters and buffers hang in a tree of plain modules, so a dotted name such as `encoder.layer.0.weight` works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sparsec.errors import GraphError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.fx import GraphModule, Node

    from sparsec.sites import Site

TYPE, SCOPE = "type", "scope"  # keys of Node.meta that sparsec keeps


def type_of(value: Any, dims: dict[str, str] | None = None) -> str:
    """The type of a (fake) value. `dims` gives our names of torch.export's size symbols.

    >>> import torch; type_of(torch.zeros(2, 3))
    'float32[2, 3]'
    """
    import torch

    if isinstance(value, torch.Tensor):
        sizes = ", ".join(_size(size, dims) for size in value.shape)
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if isinstance(value, (list, tuple)):
        return "[" + "; ".join(type_of(item, dims) for item in value) + "]"
    for plain, name in ((torch.SymInt, "int"), (torch.SymBool, "bool"), (torch.SymFloat, "float")):
        if isinstance(value, plain):
            return name
    return type(value).__name__


def _size(size: Any, dims: dict[str, str] | None) -> str:
    import torch

    if not isinstance(size, torch.SymInt):
        return str(size)
    import sympy

    names = {sympy.Symbol(symbol): sympy.Symbol(name) for symbol, name in (dims or {}).items()}
    expression = size.node.expr
    return str(expression.subs({s: names.get(sympy.Symbol(s.name), s) for s in expression.free_symbols}))


def get_tensor(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this dotted name."""
    owner, _, leaf = name.rpartition(".")
    found: Tensor = getattr(module.get_submodule(owner), leaf)
    return found


def has_tensor(module: nn.Module, name: str) -> bool:
    """Whether a parameter or buffer of this dotted name exists."""
    owner: Any = module
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Register a parameter (when `tensor` is one) or a buffer under a dotted name, replacing what was there."""
    from torch import nn

    *path, leaf = name.split(".")
    owner = module
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def delete_tensor(module: nn.Module, name: str) -> None:
    """Forget a parameter or buffer, and the plain modules that held nothing else."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    while path and not (owner._parameters or owner._buffers or owner._modules):
        path, _, leaf = path.rpartition(".")
        owner = module.get_submodule(path)
        del owner._modules[leaf]


def attribute(module: GraphModule, name: str, before: Node) -> Node:
    """The get_attr node of a tensor: the existing one, or a new typed one before `before`."""
    graph = module.graph
    for node in graph.nodes:
        if node is before:
            break
        if node.op == "get_attr" and node.target == name:
            found: Node = node
            return found
    with graph.inserting_before(before):
        node = graph.create_node("get_attr", name, name=name.replace(".", "_"))
    node.meta[TYPE] = type_of(get_tensor(module, name))
    return node


def call(before: Node, target: Callable[..., Any], args: tuple[Any, ...], kind: str, name: str) -> Node:
    """Insert a typed call before a node, in that node's scope. `kind` is the type of its value."""
    with before.graph.inserting_before(before):
        node = before.graph.create_node("call_function", target, args, name=name)
    node.meta[TYPE] = kind
    node.meta[SCOPE] = before.meta.get(SCOPE, "")
    return node


def replace(node: Node, by: Node) -> None:
    """Give `by` to all users of `node` and erase it."""
    node.replace_all_uses_with(by)
    by.graph.erase_node(node)


def calls(graph: torch.fx.Graph, target: Callable[..., Any]) -> Iterator[Node]:
    """All calls of one operator, as a list taken now, so that the graph may be edited on the way."""
    yield from [node for node in graph.nodes if node.op == "call_function" and node.target == target]


def find(module: GraphModule, name: str) -> Node:
    """The node of this name."""
    found: Node = next(node for node in module.graph.nodes if node.name == name)
    return found


def reads(module: GraphModule, name: str) -> list[Node]:
    """The get_attr nodes of a tensor."""
    return [node for node in module.graph.nodes if node.op == "get_attr" and node.target == name]


def insert_mask(module: GraphModule, site: Site, mask: str, by: Callable[..., Any] | None = None) -> None:
    """Feed every user of a site's weight `where(mask, weight, 0)` instead of the weight, computed `by` that operator.

    `by`, of mask, weight and 0, is for training, where the gradient may be another; such a graph cannot be stored.
    """
    import torch

    for weight in reads(module, site.name):
        kind, after = weight.meta[TYPE], weight.next
        operands = (attribute(module, mask, after), weight, 0.0)
        users = list(weight.users)
        masked = call(after, by or torch.ops.aten.where.ScalarOther, operands, kind, f"{weight.name}_masked")
        masked.meta[SCOPE] = users[0].meta.get(SCOPE, "")
        for user in users:
            user.replace_input_with(weight, masked)


def remove_mask(module: GraphModule, mask: str) -> None:
    """Undo `insert_mask`: users read the weight again, and the mask buffer is gone."""
    for node in reads(module, mask):
        for masked in list(node.users):
            replace(masked, masked.all_input_nodes[1])
        module.graph.erase_node(node)
    delete_tensor(module, mask)


def prune_unused(module: GraphModule) -> None:
    """Erase nodes without users, then the tensors that no node reads."""
    graph = module.graph
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in used:
            delete_tensor(module, name)


def read_late(module: GraphModule) -> None:
    """Move each get_attr to just before its first user: a dump then shows a layer's weights beside the layer."""
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(order):
        if node.op == "get_attr":
            min(node.users, key=lambda user: order[user]).prepend(node)


def move(module: GraphModule, device: torch.device) -> None:
    """Put the graph's tensors on a device, and have the nodes that make tensors make theirs there too, in place."""
    import torch
    from torch.fx.node import map_aggregate

    def there(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    module.to(device)
    for node in module.graph.nodes:
        node.args, node.kwargs = map_aggregate(node.args, there), map_aggregate(node.kwargs, there)
    module.recompile()


def check(module: GraphModule) -> None:
    """Raise GraphError unless the graph is well formed, fully typed and reads only tensors that exist."""
    try:
        module.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"the graph is not well formed: {str(error).splitlines()[0]}") from error
    for node in module.graph.nodes:
        if node.op != "output" and TYPE not in node.meta:
            raise GraphError(f"node {node.name} has no type: insert nodes through sparsec._fx, which types them")
        if node.op == "get_attr" and not has_tensor(module, str(node.target)):
            raise GraphError(f"node {node.name} reads {node.target}, which does not exist")
        if node.op in ("call_module", "call_method"):
            raise GraphError(f"node {node.name} is a {node.op}; a sparsec graph holds operators only")
