"""Normal form: from torch.export's graph to a sparsec graph of allow-listed operators and sizes.

1. Inputs come first, under the model's names; each weight is read just before its first use.
2. Guards, assertions and what nothing uses are dropped; grad-mode and autocast regions are inlined.
3. A write in place becomes its functional twin where nobody else sees the memory; elsewhere it is refused by name.
4. Every node is typed, with our names of dynamic sizes, and knows the module it came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import getitem
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.errors import TraceError

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> {dimension: name of the dynamic size}; inputs without entry have fixed sizes."""
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def normal_form(
    exported: torch.export.ExportedProgram, names: list[str], dynamic: Dynamic, aliases: dict[str, tuple[str, ...]]
) -> GraphModule:
    """The module of an exported program whose inputs are tensors called `names`.

    `aliases`: tied parameters, first name -> other names; all uses read the first. Outputs keep their keys when they
    are a dict, and are called `output`, `output_1`, ... when they are not.
    """
    import torch

    source = exported.module()
    canonical = {alias: name for name, others in aliases.items() for alias in others}
    root, graph = torch.nn.Module(), torch.fx.Graph()
    placeholders = [node for node in source.graph.nodes if node.op == "placeholder"]
    copier = _Copier(graph, source, _symbols(placeholders, names, dynamic))
    for node, name in zip(placeholders, names, strict=True):
        copier.new[node] = copier.typed(graph.placeholder(name), node)  # rule 1
    for node in source.graph.nodes:
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            keys = _output_names(exported, len(values))
            graph.output({key: copier.new[value] for key, value in zip(keys, values, strict=True)})
        elif node.op == "get_attr":
            target = canonical.get(node.target, node.target)
            value = _fx.get_tensor(source, target)
            if isinstance(value, torch.Tensor):
                _fx.set_tensor(root, target, value)
                copier.new[node] = graph.create_node("get_attr", target, name=target.replace(".", "_"))
                copier.new[node].meta[_fx.TYPE] = _fx.type_of(value)
        elif node.op == "call_function":
            copier.copy(node)
    try:
        module = torch.fx.GraphModule(root, graph, "SparsecGraph")
    except (TypeError, RuntimeError, KeyError) as error:
        raise TraceError(f"a parameter's name clashes with torch.fx's own: {error}; rename it in the model") from error
    _fx.prune_unused(module)
    _fx.read_late(module)
    return module


def output_names(count: int) -> list[str]:
    """Names of outputs that the model does not name."""
    return [f"output_{i}" if i else "output" for i in range(count)]


def _output_names(exported: torch.export.ExportedProgram, count: int) -> list[str]:
    spec: Any = exported.call_spec.out_spec
    return [str(key) for key in (spec.context if spec.type is dict else output_names(count))]


@dataclass
class _Copier:
    """Copies calls into `graph`; `new` holds what each old node became."""

    graph: Graph
    source: GraphModule
    symbols: dict[str, str]
    new: dict[Node, Any] = field(default_factory=dict)

    def copy(self, node: Node) -> None:
        if _dropped(node):
            return
        if getattr(node.target, "_name", "") in _INLINED:
            self.new[node] = self._inline(node)
        elif node.target is getitem and isinstance(self.new[node.args[0]], list):  # type: ignore[index]
            self.new[node] = self.new[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            copied = self.typed(self.graph.node_copy(node, lambda argument: self.new[argument]), node)
            if _writes(node):
                copied.target = _functional_twin(node)  # rule 3
                self.new[node.args[0]] = copied  # type: ignore[index]  # whoever reads the tensor later reads the result
            self.new[node] = copied

    def typed(self, new: Node, old: Node) -> Node:
        """Rule 4."""
        new.meta = {_fx.TYPE: _fx.type_of(old.meta.get("val"), self.symbols), _fx.SCOPE: _scope(old)}
        return new

    def _inline(self, node: Node) -> Any:
        """Copy a region's body in its place (rule 2); returns its outputs."""
        position = next(i for i, arg in enumerate(node.args) if getattr(arg, "op", "") == "get_attr")
        if node.target._name == "wrap_with_autocast" and node.args[2]:
            where = _scope(node) or "the model"
            raise TraceError(f"{where} runs under enabled autocast; trace it in the dtype it should have")
        body: Any = self.source.get_submodule(str(node.args[position].target))
        operands = iter(node.args[position + 1 :])
        inner = _Copier(self.graph, body, self.symbols)
        for child in body.graph.nodes:
            if child.op == "placeholder":
                operand = next(operands)
                inner.new[child] = self.new.get(operand, operand)  # type: ignore[arg-type]
            elif child.op == "output":
                outputs = child.args[0]
                return (
                    [inner.new[value] for value in outputs]
                    if isinstance(outputs, (list, tuple))
                    else inner.new[outputs]
                )
            else:
                inner.copy(child)
        raise TraceError(f"node {node.name}: its region has no output")


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _functional_twin(node: Node) -> Any:
    """`aten.relu` for `aten.relu_`, where nothing else sees the memory that is written; else TraceError (rule 3)."""
    import torch

    written, (operation, overload) = node.args[0], str(node.target).split(".")[1:]
    alone = not _is_view(written) and not any(_is_view(user) for user in written.users)  # type: ignore[arg-type]
    twin = getattr(getattr(torch.ops.aten, operation.removesuffix("_"), None), overload, None)
    if alone and written.op != "get_attr" and twin is not None:
        return twin
    where = _scope(node) or "the model"
    raise TraceError(
        f"{where} writes into a tensor in place ({node.target}); build the result with torch.where or torch.cat"
    )


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and not schema.is_mutable and any(result.alias_info for result in schema.returns)


def _dropped(node: Node) -> bool:
    """Assertions, which check what the exporter assumed, and batch norm's count of batches, which no output reads."""
    name = str(node.target)
    counts_batches = name == "aten.add_.Tensor" and str(node.args[0]).endswith("num_batches_tracked")
    return "_assert" in name or "sym_constrain_range" in name or counts_batches


def _scope(node: Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    scope = stack[-1][0] if stack else ""
    return "" if scope.startswith("_empty") else scope


def _symbols(placeholders: list[Node], names: list[str], dynamic: Dynamic) -> dict[str, str]:
    """torch.export's size symbols, such as s72, by our names."""
    import torch

    symbols = {}
    for node, name in zip(placeholders, names, strict=True):
        for axis, size in dynamic.get(name, {}).items():
            found = node.meta["val"].shape[axis]
            if isinstance(found, torch.SymInt):
                symbols[str(found.node.expr)] = size
    return symbols
