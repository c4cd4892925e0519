"""Trace a model into a Program: torch.export (non-strict, train mode), brought into normal form.

1. The graph is exported in train mode, so that training and deployment share it; layerdrop and stochastic depth are
   set to 0 first and listed in the origin. The program is handed out in eval mode.
2. Parameters keep the model's names and stay the same Parameter objects: training the graph trains the model.
3. The graph is brought into normal form (`normal_form`); an operator that is not on the allow-list is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsec import modes, operators
from sparsec.errors import TraceError, UsageError
from sparsec.normal_form import Dynamic, normal_form, output_names
from sparsec.program import Program
from sparsec.roles import find_sites

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_RANDOM_ATTRIBUTES = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop", "drop_path_rate", "router_jitter_noise")
MAX_SIZE = 1 << 20  # of a dynamic size without a limit: torch.export wants one


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
    sizes = {name: torch.export.Dim(name, min=low, max=high or MAX_SIZE) for name, (low, high) in dims.items()}
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
    """The Program of an exported graph whose inputs are these named tensors; see `normal_form` for its outputs."""
    module = normal_form(exported, list(inputs), dynamic, aliases)
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
        named = dict(zip(output_names(len(outputs)), outputs, strict=True))
    tensors = {str(name): value for name, value in named.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise TraceError("it returns no tensor")
    return tensors
