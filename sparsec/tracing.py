"""Trace a model into a Program: torch.export (non-strict, train mode), brought into normal form.

1. The graph is exported in train mode, so that training and deployment share it; layerdrop and stochastic depth are
   set to 0 first and listed in the origin. The program is handed out in eval mode.
2. Parameters keep the model's names and stay the same Parameter objects: training the graph trains the model.
3. Guards, assertions and what nothing uses are dropped; grad-mode and autocast regions are inlined.
4. What remains is operators of the allow-list and sizes as nodes; anything else is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

from sparsec import _fx, modes, operators
from sparsec.errors import TraceError, UsageError
from sparsec.program import Program
from sparsec.roles import find_sites

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.fx import Graph, GraphModule, Node

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> {dimension: name of the dynamic size}; inputs without entry have fixed sizes."""
_RANDOM_ATTRIBUTES = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate", "router_jitter_noise")
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")
_MAX_BATCH = 1 << 20


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    dynamic: Dynamic | None = None,
    limits: Mapping[str, int] | None = None,
    origin: dict[str, Any] | None = None,
) -> Program:
    """Trace `model` on example inputs, by name or by position.

    `dynamic`: which sizes vary; by default dimension 0 of every input, as one size `batch`. `limits`: the largest legal
    value of a size, by its name. The model is left in the mode it came in. Raises TraceError with the reason when the
    model cannot be captured as one graph.
    """
    import torch

    inputs = _named_inputs(model, example_inputs)
    dynamic = {name: {0: "batch"} for name, value in inputs.items() if value.dim()} if dynamic is None else dynamic
    _check_dynamic(dynamic, limits or {}, inputs)
    inputs = {name: _widen(value, dynamic.get(name, {})) for name, value in inputs.items()}
    dims = _dims(dynamic, limits or {})
    sizes = {name: torch.export.Dim(name, min=low, max=high or _MAX_BATCH) for name, (low, high) in dims.items()}
    shapes = {name: {axis: sizes[size] for axis, size in dynamic.get(name, {}).items()} for name in inputs}
    with _training(model) as silenced, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        try:
            exported = torch.export.export(_DictOutput(model), (inputs,), dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # torch.export raises many unrelated types
            raise TraceError(_explain(model, error)) from error
    about = {"class": type(model).__name__, **(origin or {}), **({"set_to_zero": silenced} if silenced else {})}
    return from_exported(exported, inputs, dynamic, dims, about, _aliases(model))


def from_exported(
    exported: torch.export.ExportedProgram,
    inputs: dict[str, Tensor],
    dynamic: Dynamic,
    dims: dict[str, tuple[int, int | None]],
    origin: dict[str, Any],
    aliases: dict[str, tuple[str, ...]],
) -> Program:
    """The Program of an exported graph whose inputs are named tensors and whose outputs are a dict of tensors."""
    import torch

    source = exported.module()
    canonical = {alias: name for name, others in aliases.items() for alias in others}
    graph, tensors = _normal_form(source, list(inputs), dynamic, canonical, exported)
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        _fx.set_tensor(root, name, tensor)
    module = torch.fx.GraphModule(root, graph, "SparsecGraph")
    _fx.prune_unused(module)
    _fx.read_late(module)
    modes.refuse_random(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            operators.name_of(node.target)
    modes.set_mode(module, "eval")
    program = Program(module, find_sites(module, aliases), inputs, dims, origin)
    program.verify()
    return program


def _named_inputs(model: nn.Module, example: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> dict[str, Tensor]:
    """Inputs by the names of `forward`'s parameters, so that an artifact can be called by name."""
    import torch

    if isinstance(example, torch.Tensor):
        example = (example,)
    if not isinstance(example, Mapping):
        names = [
            p.name for p in inspect.signature(model.forward).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
        ]
        if len(example) > len(names):
            raise TraceError(
                f"{type(model).__name__}.forward names {len(names)} inputs, found {len(example)}; give them by name"
            )
        example = dict(zip(names, example, strict=False))
    if not example or not all(isinstance(value, torch.Tensor) for value in example.values()):
        raise TraceError("example_inputs must be tensors, by name (a dict) or by position")
    return dict(example)


def _check_dynamic(dynamic: Dynamic, limits: Mapping[str, int], inputs: dict[str, Tensor]) -> None:
    """A misspelt name would give a graph of fixed sizes, which nobody asked for."""
    for name, sizes in dynamic.items():
        if name not in inputs:
            raise UsageError(f"dynamic names the input {name!r}; the inputs are {', '.join(inputs)}")
        if bad := [axis for axis in sizes if not 0 <= axis < inputs[name].dim()]:
            raise UsageError(f"dynamic: input {name!r} has {inputs[name].dim()} dimensions, found dimension {bad[0]}")
    known = {size for sizes in dynamic.values() for size in sizes.values()}
    if unknown := sorted(set(limits) - known):
        raise UsageError(f"limits names {unknown[0]!r}, which is no dynamic size; there are {', '.join(sorted(known))}")


def _widen(value: Tensor, sizes: Mapping[int, str]) -> Tensor:
    """Repeat dynamic dimensions of size 1: torch.export would take a 1 for a constant."""
    for axis in sizes:
        if value.shape[axis] == 1:
            value = value.repeat_interleave(2, dim=axis)
    return value


def _dims(dynamic: Dynamic, limits: Mapping[str, int]) -> dict[str, tuple[int, int | None]]:
    names = [size for sizes in dynamic.values() for size in sizes.values()]
    return {name: (1, limits.get(name)) for name in dict.fromkeys(names)}


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Tied parameters: first name -> other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values() if others}


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[list[str]]:
    """Train mode with structural randomness off (rule 1); restores everything, and yields what was set to 0."""
    was_training = {module: module.training for module in model.modules()}
    restore, silenced = [], []
    for name, module in model.named_modules():
        holders = (
            [(name, module)] if module is not model else [(name, module), ("config", getattr(model, "config", None))]
        )
        for where, holder in holders:
            names = [*_RANDOM_ATTRIBUTES, *(["drop_prob"] if "DropPath" in type(holder).__name__ else [])]
            for attribute in names:
                if isinstance(value := getattr(holder, attribute, None), float) and value > 0:
                    restore.append((holder, attribute, value))
                    silenced.append(f"{where}.{attribute}".lstrip("."))
                    setattr(holder, attribute, 0.0)
    model.train()
    try:
        yield silenced
    finally:
        for module, training in was_training.items():
            module.training = training
        for holder, attribute, value in restore:
            setattr(holder, attribute, value)


def _explain(model: nn.Module, error: Exception) -> str:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{type(model).__name__} cannot be captured as one graph: {type(error).__name__}: {first[:500]}. "
        "If a size is fixed by the model, leave it out of `dynamic`; if Python code depends on data, use torch.where"
    )


def _DictOutput(model: nn.Module) -> nn.Module:
    """A wrapper whose outputs are a plain dict of tensors and whose parameter names are the model's (rule 2).

    It shares the model's own dictionaries and keeps the model out of them: an ordinary wrapper would prefix every name.
    """
    import torch

    class DictOutput(torch.nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return _as_dict(self.__dict__["traced_model"](**inputs))

    wrapper = DictOutput()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        wrapper.__dict__[name] = model.__dict__[name]
    wrapper.__dict__["traced_model"] = model
    return wrapper


def _as_dict(outputs: Any) -> dict[str, Tensor]:
    """Outputs by name: `output`, `output_1`, ... where the model names none. What is no tensor (a cache) is dropped."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    else:
        named = {f"output_{i}" if i else "output": value for i, value in enumerate(outputs)}
    tensors = {str(name): value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise TraceError("it returns no tensor")
    return tensors


def _normal_form(
    source: GraphModule,
    names: list[str],
    dynamic: Dynamic,
    canonical: dict[str, str],
    exported: torch.export.ExportedProgram,
) -> tuple[Graph, dict[str, Tensor]]:
    """The graph of rule 3 and 4, inputs first, and the tensors it reads by name."""
    import torch

    graph, tensors = torch.fx.Graph(), {}
    new: dict[Node, Any] = {}
    placeholders = [node for node in source.graph.nodes if node.op == "placeholder"]
    symbols = _symbols(placeholders, names, dynamic)
    for node, name in zip(placeholders, names, strict=True):
        new[node] = graph.placeholder(name)
        new[node].meta[_fx.TYPE] = _fx.type_of(node.meta["val"], symbols)
    keys = exported.call_spec.out_spec.context
    for node in source.graph.nodes:
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else (node.args[0],)
            result = graph.output({key: new[value] for key, value in zip(keys, values, strict=True)})
            result.meta[_fx.TYPE] = ""
        elif node.op == "get_attr":
            target = canonical.get(node.target, node.target)
            value = _fx.get_tensor(source, target)
            if isinstance(value, torch.Tensor):
                tensors[target] = value
                new[node] = graph.create_node("get_attr", target, name=target.replace(".", "_"))
                new[node].meta[_fx.TYPE] = _fx.type_of(value)
        elif node.op == "call_function" and not _dropped(node):
            _copy_call(graph, node, new, source, symbols)
    return graph, tensors


def _copy_call(graph: Graph, node: Node, new: dict[Node, Any], source: GraphModule, symbols: dict[str, str]) -> None:
    kind = getattr(node.target, "_name", "")
    if kind in _INLINED:
        new[node] = _inline(graph, node, new, source, symbols)
        return
    if node.target is getitem and isinstance(new[node.args[0]], list):  # type: ignore[index]
        new[node] = new[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    copied = graph.node_copy(node, lambda argument: new[argument])
    copied.meta = {_fx.TYPE: _fx.type_of(node.meta.get("val"), symbols), _fx.SCOPE: _scope(node)}
    new[node] = copied
    if _writes(node):
        copied.target = _functional_twin(node)
        new[node.args[0]] = copied  # type: ignore[index]  # whoever reads the tensor later reads the result


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _functional_twin(node: Node) -> Any:
    """`aten.relu` for `aten.relu_`, where nothing else sees the memory that is written; else TraceError (rule 4)."""
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


def _inline(graph: Graph, node: Node, new: dict[Node, Any], source: GraphModule, symbols: dict[str, str]) -> Any:
    """Copy a grad-mode or autocast region's body in its place; returns its outputs (rule 3)."""
    position = next(i for i, arg in enumerate(node.args) if getattr(arg, "op", "") == "get_attr")
    if node.target._name == "wrap_with_autocast" and node.args[2]:
        raise TraceError(
            f"{_scope(node) or 'the model'} runs under enabled autocast; trace it in the dtype it should have"
        )
    body = source.get_submodule(str(node.args[position].target))
    operands = iter(node.args[position + 1 :])
    inner: dict[Node, Any] = {}
    for child in body.graph.nodes:
        if child.op == "placeholder":
            operand = next(operands)
            inner[child] = new.get(operand, operand)  # type: ignore[arg-type]
        elif child.op == "output":
            outputs = child.args[0]
            return [inner[value] for value in outputs] if isinstance(outputs, (list, tuple)) else inner[outputs]
        elif not _dropped(child):
            _copy_call(graph, child, inner, body, symbols)  # type: ignore[arg-type]
    raise TraceError(f"node {node.name}: its region has no output")


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
