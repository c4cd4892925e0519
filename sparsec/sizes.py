"""Dynamic sizes of a traced graph: which inputs have them, their ranges, and whether the graph is right in all of them.

1. A size is at least 1, or as large as `limits` says.
2. Python code that asked about a size while the model was exported leaves a condition in the graph. Where a legal size
   breaks it, the graph and the model are run at that size: equal outputs prove that the condition is a formality
   (most are: may this broadcast?). Different outputs mean that the model branches on its sizes, which is refused.
3. A size that is too large to be tried ends the range just below it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.errors import TraceError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import Node

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> {dimension: name of the dynamic size}; inputs without entry have fixed sizes."""
Limits = Mapping[str, int | tuple[int, int]]
"""Name of a dynamic size -> its largest legal value, or its smallest and largest."""
Run = Callable[[dict[str, "Tensor"]], dict[str, "Tensor"]]
MAX_SIZE = 1 << 20  # of a dynamic size without a limit: torch.export wants one
_LARGEST_RUN = 1 << 13  # elements of an input with which a condition is tried
_TRIES = 8


def check(dynamic: Dynamic, limits: Limits, inputs: Mapping[str, Tensor]) -> None:
    """A misspelt name would give a graph of fixed sizes, which nobody asked for: raises UsageError."""
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UsageError(f"dynamic names the input {name!r}; the inputs are {', '.join(inputs)}")
        if bad := [axis for axis in axes if not 0 <= axis < inputs[name].dim()]:
            raise UsageError(f"dynamic: input {name!r} has {inputs[name].dim()} dimensions, found dimension {bad[0]}")
    known = {size for axes in dynamic.values() for size in axes.values()}
    if unknown := sorted(set(limits) - known):
        raise UsageError(f"limits names {unknown[0]!r}, which is no dynamic size; there are {', '.join(sorted(known))}")


def widen(value: Tensor, axes: Mapping[int, str]) -> Tensor:
    """Repeat dynamic dimensions of size 1: torch.export would take a 1 for a constant."""
    for axis in axes:
        if value.shape[axis] == 1:
            value = value.repeat_interleave(2, dim=axis)
    return value


def ranges(dynamic: Dynamic, limits: Limits) -> dict[str, tuple[int, int | None]]:
    """Smallest and largest legal value of every dynamic size (rule 1)."""
    found: dict[str, tuple[int, int | None]] = {}
    for name in (size for axes in dynamic.values() for size in axes.values()):
        limit = limits.get(name)
        found[name] = limit if isinstance(limit, tuple) else (1, limit)
    return found


def symbols(placeholders: list[Node], names: list[str], dynamic: Dynamic) -> dict[str, str]:
    """torch.export's size symbols, such as s72, by our names."""
    import torch

    found = {}
    for node, name in zip(placeholders, names, strict=True):
        for axis, size in dynamic.get(name, {}).items():
            extent = node.meta["val"].shape[axis]
            if isinstance(extent, torch.SymInt):
                found[str(extent.node.expr)] = size
    return found


@dataclass(frozen=True)
class Condition:
    """What must hold for the sizes, as a sympy expression, and where it was asked."""

    expression: Any
    sizes: tuple[str, ...]
    where: str

    def holds(self, values: Mapping[str, int]) -> bool:
        """Whether it holds for these sizes."""
        by_name = {str(symbol): symbol for symbol in self.expression.free_symbols}
        return bool(self.expression.subs({by_name[name]: values[name] for name in self.sizes}))


def conditions(exported: torch.export.ExportedProgram, names: Mapping[str, str]) -> list[Condition]:
    """What the exported graph asserts of sizes. `names`: our names of size symbols; others are no sizes of inputs."""
    import sympy
    import torch

    found: dict[str, Condition] = {}
    for node in exported.graph.nodes:
        asked = getattr(node.args[0], "meta", {}).get("val") if "_assert_scalar" in str(node.target) else None
        if not isinstance(asked, torch.SymBool):
            continue
        expression = asked.node.expr
        free = {str(symbol) for symbol in expression.free_symbols}
        if free and free <= names.keys():
            renamed = {symbol: sympy.Symbol(names[str(symbol)], integer=True) for symbol in expression.free_symbols}
            condition = expression.subs(renamed)
            sizes = tuple(sorted({names[symbol] for symbol in free}))
            found.setdefault(str(condition), Condition(condition, sizes, _where(node)))
    return list(found.values())


def _where(node: Node) -> str:
    stack = list(node.args[0].meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack and stack[-1][0] else "the model"


def prove(
    asked: list[Condition],
    dims: Mapping[str, tuple[int, int | None]],
    dynamic: Dynamic,
    inputs: Mapping[str, Tensor],
    model: Run,
    graph: Run,
) -> dict[str, tuple[int, int | None]]:
    """Rule 2; the ranges that are proven, or TraceError naming sizes at which model and graph differ."""
    proven = dict(dims)
    for condition in asked:
        broken = _broken(condition, dims)
        for values in [*broken[:_TRIES], *broken[_TRIES:][-1:]]:
            tried = {name: _resized(value, dynamic.get(name, {}), values) for name, value in inputs.items()}
            if max(value.numel() for value in tried.values()) > _LARGEST_RUN:
                name, size = max(values.items(), key=lambda item: item[1])
                proven[name] = (dims[name][0], min(size - 1, proven[name][1] or MAX_SIZE))  # rule 3
            elif not _equal(tried, model, graph):
                raise TraceError(_branches(condition, values))
    return proven


def _branches(condition: Condition, values: Mapping[str, int]) -> str:
    sizes = ", ".join(f"{name} {value}" for name, value in values.items())
    return (
        f"{condition.where} branches on sizes: at {sizes} the model computes something else than the graph "
        f"traced here, which holds where {condition.expression}. Give the range that is needed, such as "
        f"limits={{'{next(iter(values))}': (smallest, largest)}}, or leave the size out of `dynamic`"
    )


def _broken(condition: Condition, dims: Mapping[str, tuple[int, int | None]]) -> list[dict[str, int]]:
    """Legal sizes that break a condition; of large ranges the ends, and what the condition mentions."""
    import sympy

    mentioned = {int(number) for number in condition.expression.atoms(sympy.Integer)}
    near = {number + step for number in mentioned for step in (-1, 0, 1)}
    candidates = []
    for name in condition.sizes:
        low, high = dims[name][0], dims[name][1] or MAX_SIZE
        dense = range(low, min(high, low + (64 if len(condition.sizes) == 1 else 6)) + 1)
        values = {*dense, *near, high - 1, high}
        candidates.append(sorted(value for value in values if low <= value <= high))
    assignments = (dict(zip(condition.sizes, values, strict=True)) for values in itertools.product(*candidates))
    return [values for values in assignments if not condition.holds(values)]


def _resized(value: Tensor, axes: Mapping[int, str], values: Mapping[str, int]) -> Tensor:
    """The example repeated or cut to other sizes."""
    import torch

    for axis, size in axes.items():
        if size in values:
            value = value.index_select(axis, torch.arange(values[size], device=value.device) % value.shape[axis])
    return value


def _equal(inputs: dict[str, Tensor], model: Run, graph: Run) -> bool:
    import torch

    try:
        with torch.no_grad():
            expected, found = model(inputs), graph(inputs)
    except (RuntimeError, IndexError, ValueError):
        return False
    return all(
        torch.equal(value.isnan(), found[name].isnan()) and torch.equal(value.nan_to_num(), found[name].nan_to_num())
        for name, value in expected.items()
    )
