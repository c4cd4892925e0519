"""Normal form: from torch.export's graph to a sparsec graph of allow-listed operators and sizes.

1. Inputs come first, under the model's names; each weight is read just before its first use.
2. Guards, assertions and what nothing uses are dropped; grad-mode and autocast regions are inlined.
3. A write in place becomes its functional twin (`_Writes`). Memory that is made to be overwritten is made of zeros.
4. The grouped product of expert layers becomes `sparsec::expert_linear`, which needs no transformers.
5. Every node is typed, with our names of dynamic sizes, and knows the module it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import getitem
from typing import TYPE_CHECKING, Any

from sparsec import _fx, sizes, writes
from sparsec.errors import TraceError
from sparsec.sizes import Dynamic as Dynamic

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule, Node

_GROUPED = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
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
    copier = _Copier(graph, source, sizes.symbols(placeholders, names, dynamic))
    for node, name in zip(placeholders, names, strict=True):
        copier.new[node] = copier.typed(graph.placeholder(name), node)  # rule 1
    for node in source.graph.nodes:
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            keys = _output_names(exported, len(values))
            graph.output({key: copier.current(value) for key, value in zip(keys, values, strict=True)})
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
        elif writes.is_write(node):
            self._write(node)
        else:
            copied = self.typed(self.graph.node_copy(node, self.current), node)
            _replace_target(copied)
            self.new[node] = copied

    def current(self, old: Node) -> Any:
        """What an operand has become; a write's result is the tensor it wrote to, as it is by now."""
        return self.new[writes.written(old)]

    def _write(self, node: Node) -> None:
        """Rule 3: what is read later is the twin's value, under every name of the memory that was written."""
        twin = writes.functional_twin(node)
        copied = self.typed(self.graph.node_copy(node, self.current), node)
        copied.target = twin
        target = writes.written(node)
        if wider := writes.promoted(node):
            copied.meta[_fx.TYPE] = _fx.type_of(node.meta["val"].to(wider), self.symbols)
            copied = self._call("aten.to.dtype", (copied, node.meta["val"].dtype), node, target)
        self.new[target] = copied
        for view, base in writes.scattered(node):
            operation = str(view.target).split(".")[1]
            args = (self.new[base], self.new[view], *self._arguments(view))
            self.new[base] = self._call(writes.SCATTER[operation], args, node, base)

    def _arguments(self, view: Node) -> tuple[Any, ...]:
        """The arguments of a view after its tensor, as new nodes."""
        import torch

        mapped: tuple[Any, ...] = torch.fx.map_arg(view.args[1:], self.current)
        return mapped

    def _call(self, name: str, args: tuple[Any, ...], node: Node, like: Node) -> Node:
        import torch

        operation, overload = name.split(".")[1:]
        function = getattr(getattr(torch.ops.aten, operation), overload)
        new = self.typed(self.graph.call_function(function, args), like)
        new.meta[_fx.SCOPE] = writes.scope(node)
        return new

    def typed(self, new: Node, old: Node) -> Node:
        """Rule 5."""
        new.meta = {_fx.TYPE: _fx.type_of(old.meta.get("val"), self.symbols), _fx.SCOPE: writes.scope(old)}
        return new

    def _inline(self, node: Node) -> Any:
        """Copy a region's body in its place (rule 2); returns its outputs."""
        position = next(i for i, arg in enumerate(node.args) if getattr(arg, "op", "") == "get_attr")
        if node.target._name == "wrap_with_autocast" and node.args[2]:
            where = writes.scope(node) or "the model"
            raise TraceError(f"{where} runs under enabled autocast; trace it in the dtype it should have")
        body: Any = self.source.get_submodule(str(node.args[position].target))
        operands = iter(node.args[position + 1 :])
        inner = _Copier(self.graph, body, self.symbols)
        for child in body.graph.nodes:
            if child.op == "placeholder":
                operand = next(operands)
                inner.new[child] = self.current(operand) if hasattr(operand, "op") else operand  # type: ignore[arg-type]
            elif child.op == "output":
                outputs = child.args[0]
                return (
                    [inner.current(value) for value in outputs]
                    if isinstance(outputs, (list, tuple))
                    else inner.current(outputs)
                )
            else:
                inner.copy(child)
        raise TraceError(f"node {node.name}: its region has no output")


def _replace_target(node: Node) -> None:
    """Rules 3 and 4 for operators that exist under another name."""
    import torch

    name = str(node.target)
    if name in ("aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"):
        zeros = name.split(".")[1].replace("empty", "zeros")
        node.target = getattr(torch.ops.aten, zeros).default
        if zeros == "zeros":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "memory_format"}
    elif name in _GROUPED and len(node.args) == 3 and not node.kwargs:
        from sparsec.ops import expert_linear

        x, weight, offsets = node.args
        node.target, node.args = expert_linear, (x, offsets, weight)


def _dropped(node: Node) -> bool:
    """Assertions, which check what the exporter assumed, and batch norm's count of batches, which no output reads."""
    name = str(node.target)
    counts_batches = name == "aten.add_.Tensor" and str(writes.written(node)).endswith("num_batches_tracked")
    return "_assert" in name or "sym_constrain_range" in name or counts_batches
