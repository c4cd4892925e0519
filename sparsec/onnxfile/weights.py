"""Find the weights of an .onnx file: what Gemm, MatMul and Conv multiply, whatever stands between it and the file.

1. A stored matrix that the main graph multiplies in one way is a weight, seen as (batch, rows, cols), cols being the
   inputs that patterns run along. One that several nodes read is one weight.
2. Every other stored matrix is listed with the reason: looked up, read by another operator, of a type with no exact
   zero in place (fp8, 4 bits), inside If, Loop or Scan, inside a function, read by nothing.
3. Tables of sparsec's own packed operators are a weight too, which is sparse already.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsec.errors import ArtifactError
from sparsec.onnxfile import packed, roles
from sparsec.onnxfile.opened import TORCH, OnnxFile, dtype_of, first_line
from sparsec.onnxfile.routes import Route, further
from sparsec.onnxfile.scopes import Reader, Scope, attribute, label
from sparsec.roles import EXCLUDED_ROLES
from sparsec.sites import Exclusion
from sparsec.view import WeightView

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.pattern import Pattern

_MULTIPLIES = frozenset({"Gemm", "MatMul", "Conv"})
_READABLE = (*TORCH, "bfloat16")
_FLOATS = ("float", "double", "float16", "bfloat16")
_SMALL = ("float8", "float6", "float4", "int4", "uint4", "int2", "uint2")
_INTEGER_PRODUCTS = frozenset(
    "MatMulInteger QLinearMatMul ConvInteger QLinearConv MatMulNBits MatMulIntegerToFloat QGemm".split()
)
_PREFIX = 4096  # values by which tensors are first told apart


@dataclass(frozen=True)
class Weight:
    """One weight, as the matrices (batch, rows, cols) that its readers multiply with."""

    name: str
    """Of the initializer or Constant it comes from; of packed tables, what they were called before."""
    kind: str
    """Gemm, MatMul, Conv, or the packed operator NMLinear or NMWeight."""
    shape: tuple[int, int, int]
    dtype: str
    """As stored: float, float16, bfloat16, double, int8, uint8."""
    users: tuple[str, ...]
    role: str
    """What the layer does; `head` and others stay dense by default, see `roles`."""
    source: Stored | packed.Tables
    twins: tuple[str, ...] = ()
    """Other names under which the file holds the same bytes again."""

    @property
    def excluded(self) -> str | None:
        """Why it stays dense by default, or None."""
        return EXCLUDED_ROLES.get(self.role)

    @property
    def packed(self) -> Pattern | None:
        """The pattern of a packed weight."""
        return self.source.layout_pattern if isinstance(self.source, packed.Tables) else None

    def read(self, file: OnnxFile) -> Tensor:
        """The values, (batch, rows, cols); in float32 where they are quantized."""
        return self.source.read(file)


@dataclass(frozen=True)
class Stored:
    """A stored tensor, its way to the products that read it, and the view that they have of it there."""

    tensor: Any
    route: Route
    view: WeightView

    def read(self, file: OnnxFile) -> Tensor:
        """See `Weight.read`."""
        try:
            return self.view.to_matrices(self.route.operand(file, self.tensor))
        except RuntimeError as error:  # torch's, about shapes
            raise ArtifactError(f"{file.path}: {self.tensor.name}: shapes do not fit: {first_line(error)}") from error

    def pruned(self, file: OnnxFile, mask: Tensor) -> Tensor:
        """The stored tensor with zeros (or zero points) where `mask`, (batch, rows, cols), is false."""
        return self.route.pruned(file, self.tensor, self.view.to_parameter(mask))


@dataclass(frozen=True)
class Survey:
    """The weights of a file in graph order, and every stored matrix that is none, with its reason."""

    weights: tuple[Weight, ...]
    exclusions: tuple[Exclusion, ...]


class _Use(NamedTuple):
    """Where a stored value ends up: the node that does more than move it (None: the graph's outputs)."""

    reader: Reader | None
    route: Route
    view: WeightView | None
    """How a product sees it; None where it is not multiplied."""


def weights_of(path: Path) -> Iterator[tuple[Weight, Tensor]]:
    """Each weight of an .onnx file with its values, read one at a time. Raises UsageError or ArtifactError."""
    file = OnnxFile(path)
    yield from ((weight, weight.read(file)) for weight in survey(file).weights)


def survey(file: OnnxFile) -> Survey:
    """Find all weights of a file; reads only as much of their values as tells equal ones apart.

    Raises ArtifactError where nodes have too few inputs, or axes that their operands have not.
    """
    try:
        return _survey(file)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"{file.path}: its graph contradicts itself: {first_line(error)}; export it again"
        ) from error


def _survey(file: OnnxFile) -> Survey:
    tables, known = packed.tables_of(file)
    weights = [Weight(t.name, t.kind, t.shape, t.dtype, t.users, "packed", t) for t in tables]
    exclusions: list[Exclusion] = []
    for scope in (file.main, *file.others):
        for name, tensor in scope.constants.items():
            if (scope is file.main and name in known) or len(tensor.dims) < 2:
                continue
            uses = list(_uses(file, scope, name, Route(tuple(tensor.dims))))
            if found := _weight(scope, name, tensor, uses):
                weights.append(found) if isinstance(found, Weight) else exclusions.append(found)
    why = "a sparse_initializer: expected an ordinary one"
    exclusions += [Exclusion(one.values.name, "other", why) for one in file.model.graph.sparse_initializer]
    order = {label(node): i for i, node in enumerate(file.main.nodes)}
    weights.sort(key=lambda weight: order[weight.users[0]])
    return Survey(tuple(_with_twins(file, weights)), tuple(exclusions))


def _uses(file: OnnxFile, scope: Scope, name: str, route: Route) -> Iterator[_Use]:
    if name in scope.outputs:
        yield _Use(None, route, None)
    for reader in scope.readers.get(name, ()):
        if way := further(file, route, reader):
            yield from _uses(file, reader.scope, reader.node.output[0], way)
        else:
            yield _Use(reader, *_seen(route, reader))


def _seen(route: Route, reader: Reader) -> tuple[Route, WeightView | None]:
    """How a product sees the operand that a route gave, or None in place of a view."""
    node, index, _ = reader
    rank = len(route.shape)
    if node.domain or node.op_type not in _MULTIPLIES or route.rounding:
        return route, None
    if node.op_type == "Conv":
        groups = attribute(node, "group", 1)
        fits = index == 1 and rank > 2 and route.shape[0] % groups == 0
        return route, WeightView(tuple(range(rank)), route.shape, groups) if fits else None
    if index > 1 or rank < 2 or (node.op_type == "Gemm" and rank > 2):
        return route, None
    inputs_first = (index == 1) != bool(attribute(node, "transB" if index else "transA", 0))
    if rank == 2:
        return route, WeightView((1, 0) if inputs_first else (0, 1), route.shape)
    if rank > 3:
        route = route.moved((math.prod(route.shape[:-2]), *route.shape[-2:]))
    axes = (0, 2, 1) if inputs_first else (0, 1, 2)
    return route, WeightView(axes, route.shape, route.shape[0], experts=True)


def _weight(scope: Scope, name: str, tensor: Any, uses: list[_Use]) -> Weight | Exclusion | None:
    """A weight (rule 1), the reason why it is none (rule 2), or None for what nobody would take for one."""
    dtype = dtype_of(tensor)
    multiplied = [use for use in uses if use.view is not None]
    rest = [use for use in uses if use.view is None]
    operators = sorted({use.reader.node.op_type for use in rest if use.reader})
    vector = sum(size > 1 for size in tensor.dims) < 2
    stored = (dtype in _FLOATS or dtype.startswith(_SMALL)) and not vector
    if not (stored or multiplied or _INTEGER_PRODUCTS & set(operators)):
        return None
    if not uses:
        return Exclusion(name, "unused", "no node reads it")
    inner = [reader.scope.where for use in uses if (reader := use.reader) and reader.scope.where]
    if scope.where or inner:
        return Exclusion(name, "other", f"{scope.where or f'read {inner[0]}'}: only the main graph is pruned")
    if dtype.startswith(_SMALL) or "MatMulNBits" in operators:
        kind = dtype if dtype.startswith(_SMALL) else "blocks of 4 bits"
        return Exclusion(name, "other", f"stored as {kind}: sparsec prunes float and int8 weights; prune before that")
    if reason := _no_weight(multiplied, rest, operators):
        return Exclusion(name, "embedding" if operators == ["Gather"] else "other", reason)
    if dtype not in _READABLE or (dtype not in _FLOATS and multiplied[0].route.quantized is None):
        return Exclusion(name, "other", f"stored as {dtype}: sparsec prunes float and int8 weights")
    (first, route, view), nodes = multiplied[0], [use.reader.node for use in multiplied if use.reader]
    assert first is not None and view is not None
    role = "tied embedding" if rest else roles.role(scope, first.node, first.at, view)
    users = tuple(dict.fromkeys(map(label, nodes)))
    return Weight(name, first.node.op_type, view.shape, dtype, users, role, Stored(tensor, route, view))


def _no_weight(multiplied: list[_Use], rest: list[_Use], operators: list[str]) -> str | None:
    functions = [use.reader.node for use in rest if use.reader and use.reader.node.domain]
    if not multiplied and operators == ["Gather"]:
        return "an embedding table: it is looked up, not multiplied"
    if rest and (operators != ["Gather"] or any(use.reader is None for use in rest)):
        names = [f"{node.domain}::{node.op_type}" for node in functions] or operators or ["the graph's outputs"]
        said = f"read by {', '.join(dict.fromkeys(names))}: only what Gemm, MatMul and Conv alone multiply is pruned"
        return f"{said}; prune the file before it is quantized" if _INTEGER_PRODUCTS & set(operators) else said
    if len({(use.route, use.view) for use in multiplied}) > 1:
        return "multiplied in two ways (rows in one place, columns in another): no pattern fits both"
    return None


def _with_twins(file: OnnxFile, weights: list[Weight]) -> Iterator[Weight]:
    """The weights, each with the names of those whose stored bytes are the same."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for weight in weights:
        if isinstance(weight.source, Stored):
            tensor = weight.source.tensor
            start = file.array(tensor).reshape(-1)[:_PREFIX].tobytes()
            groups.setdefault((tensor.data_type, tuple(tensor.dims), start), []).append((weight.name, tensor))
    same: dict[Any, list[str]] = {}
    for group in groups.values():
        for name, tensor in group if len(group) > 1 else ():
            digest = hashlib.sha256(file.array(tensor).reshape(-1).view("uint8").data).digest()
            same.setdefault(digest, []).append(name)
    twins = {name: tuple(other for other in names if other != name) for names in same.values() for name in names}
    for weight in weights:
        yield dataclasses.replace(weight, twins=twins.get(weight.name, ()))
