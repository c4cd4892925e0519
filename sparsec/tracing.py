"""Trace a model into a Program: torch.export (non-strict, train mode), brought into normal form.

1. The graph is exported in train mode, so that training and deployment share it; caches and random parts that are no
   dropout are off meanwhile (`modes.exporting`), the latter listed in the origin. The program comes in eval mode.
2. Parameters keep the model's names and stay the same Parameter objects: training the graph trains the model.
3. The graph is brought into normal form (`normal_form`); an operator that is not on the allow-list is refused by name.
4. Conditions on dynamic sizes that the export left open are proven by running the model (`sizes`).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import modes, operators, sizes
from sparsec.errors import TraceError
from sparsec.normal_form import normal_form, output_names
from sparsec.program import Program
from sparsec.roles import find_sites
from sparsec.sites import Exclusion
from sparsec.sizes import MAX_SIZE as MAX_SIZE
from sparsec.sizes import Dynamic, Limits

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def trace(
    model: nn.Module,
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
    dynamic: Dynamic | None = None,
    limits: Limits | None = None,
    origin: dict[str, Any] | None = None,
) -> Program:
    """Trace `model` on example inputs, by name or by position.

    `dynamic`: which sizes vary; by default dimension 0 of every input, as one size `batch`. `limits`: the largest legal
    value of a size, by its name, or its smallest and largest. The model is left in the mode it came in, with its cache
    settings. Outputs that are no tensors are dropped and listed in the origin. Raises TraceError with the reason when
    the model cannot be captured as one graph.
    """
    inputs = _named_inputs(model, example_inputs)
    dynamic = {name: {0: "batch"} for name, value in inputs.items() if value.dim()} if dynamic is None else dynamic
    sizes.check(dynamic, limits or {}, inputs)
    inputs = {name: sizes.widen(value, dynamic.get(name, {})) for name, value in inputs.items()}
    dims = sizes.ranges(dynamic, limits or {})
    dropped: list[str] = []
    with modes.exporting(model) as silenced:
        exported = _export(model, inputs, dynamic, dims, dropped)
        about = {"class": type(model).__name__, **(origin or {})}
        about |= {"set_to_zero": silenced} if silenced else {}
        about |= {"dropped_outputs": dropped} if dropped else {}
        program = from_exported(exported, inputs, dynamic, dims, about, _aliases(model))
        model.eval()
        asked = sizes.conditions(exported, _symbols(exported, list(inputs), dynamic))
        dims = sizes.prove(
            asked,
            dims,
            dynamic,
            inputs,
            lambda given: outputs_by_name(model(**given), []),
            lambda given: program(**given),
        )
    return program.replace(
        dims=dims, sites=replace(program.sites, exclusions=program.sites.exclusions + _unread(model, program))
    )


def _export(
    model: nn.Module,
    inputs: dict[str, Tensor],
    dynamic: Dynamic,
    dims: Mapping[str, tuple[int, int | None]],
    dropped: list[str],
) -> torch.export.ExportedProgram:
    import torch

    dim = {name: torch.export.Dim(name, min=low, max=high or MAX_SIZE) for name, (low, high) in dims.items()}
    shapes = {name: {axis: dim[size] for axis, size in dynamic.get(name, {}).items()} for name in inputs}
    try:
        with _quiet():
            return torch.export.export(
                _DictOutput(model, dropped),
                (inputs,),
                dynamic_shapes=(shapes,),
                strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,  # as conditions, which rule 4 proves or refuses
            )
    except Exception as error:  # torch.export raises many unrelated types
        raise TraceError(_explain(model, error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals, and prints the whole graph before it raises what we report."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled


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


def _aliases(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Tied parameters: first name -> other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: tuple(others) for first, *others in names.values() if others}


def _symbols(exported: torch.export.ExportedProgram, names: list[str], dynamic: Dynamic) -> dict[str, str]:
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    return sizes.symbols(placeholders[-len(names) :], names, dynamic)


def _unread(model: nn.Module, program: Program) -> tuple[Exclusion, ...]:
    """Parameters that the graph does not read: they are named, like all that stay dense."""
    read = {name for name, _ in program.module.named_parameters(remove_duplicate=False)}
    reason = "no output depends on it, so the graph does not hold it"
    return tuple(Exclusion(name, "unused", reason) for name, _ in model.named_parameters() if name not in read)


def _explain(model: nn.Module, error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    first = " ".join(lines[1:2]).lstrip("- ") if lines[0].startswith("Constraints violated") else lines[0]
    advice = (
        "If a size is fixed by the model, leave it out of `dynamic`; if Python code depends on data, use torch.where"
    )
    for size, low, high in re.findall(r"(\w+) = Dim\('\1', min=(\d+), max=(\d+)\)", str(error)):
        limits = f"limits={{'{size}': ({low}, {high})}}"
        advice = f"It branches on {size}: one graph holds for {size} {low} to {high}; give {limits}"
    for size, value in re.findall(r"^\s*(\w+) = (\d+)$", str(error), re.MULTILINE):
        advice = f"The model fixes {size} at {value}: leave it out of `dynamic`"
    return (
        f"{type(model).__name__} cannot be captured as one graph: {_spot(model, error)}"
        f"{type(error).__name__}: {first[:500].rstrip('.')}. {advice}"
    )


def _spot(model: nn.Module, error: Exception) -> str:
    """The module and the line of the model's own code where the export stopped, as far as the error knows them."""
    import torch

    names = {id(module): name or "the model" for name, module in model.named_modules()}
    foreign = (str(Path(torch.__file__).parent), str(Path(__file__).parent), sysconfig.get_path("stdlib"))
    installed = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    scope = spot = ""
    frames = error.__traceback__
    while frames is not None:
        code, line = frames.tb_frame.f_code, frames.tb_lineno
        scope = names.get(id(frames.tb_frame.f_locals.get("self")), scope)
        file = code.co_filename
        if scope and (file.startswith(installed) or not file.startswith(foreign)) and not file.startswith(foreign[:2]):
            shown = next(
                (file.removeprefix(folder).lstrip("/") for folder in installed if file.startswith(folder)), file
            )
            spot = f"{scope}, {shown}:{line}: `{linecache.getline(file, line).strip()[:120]}`: "
        frames = frames.tb_next
    return spot


def _DictOutput(model: nn.Module, dropped: list[str]) -> nn.Module:
    """A wrapper whose outputs are a plain dict of tensors and whose parameter names are the model's (rule 2).

    It shares the model's own dictionaries and keeps the model out of them: an ordinary wrapper would prefix every name.
    """
    import torch

    class DictOutput(torch.nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return outputs_by_name(self.__dict__["traced_model"](**inputs), dropped)

    wrapper = DictOutput()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        wrapper.__dict__[name] = model.__dict__[name]
    wrapper.__dict__["traced_model"] = model
    return wrapper


def outputs_by_name(outputs: Any, dropped: list[str]) -> dict[str, Tensor]:
    """Outputs by name: `output`, `output_1`, ... where the model names none.

    What is no tensor (a cache, a tuple of hidden states) goes by name into `dropped`.
    """
    import torch

    if isinstance(outputs, torch.Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    else:
        named = dict(zip(output_names(len(outputs)), outputs, strict=True))
    tensors = {str(name): value for name, value in named.items() if isinstance(value, torch.Tensor)}
    dropped[:] = [str(name) for name, value in named.items() if value is not None and str(name) not in tensors]
    if not tensors:
        raise TraceError("it returns no tensor")
    return tensors
