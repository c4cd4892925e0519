"""Small inputs for an .onnx file that nothing else is known about, so that it can be run before and after pruning.

Inputs follow the types that the graph declares. Sizes that it leaves open are small, equal where they have the same
name, and summed where it is an expression (`past + length`); several are tried. Floating-point inputs are random,
integers that look rows up are random below the number of rows, other integers 1, truth values true.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError
from sparsec.onnxfile.opened import OnnxFile, dtype_of
from sparsec.onnxfile.scopes import Scope, attribute

if TYPE_CHECKING:
    from torch import Tensor

_SIZES = ((2, 8), (1, 8), (2, 32), (1, 32), (1, 224))  # of a first axis that is left open, and of all others
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
_FLOATS = ("float", "double", "float16")
Run = Callable[..., "dict[str, Tensor]"]
"""A model that takes inputs by name and gives outputs by name."""
_SAME_SHAPE = frozenset({"Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Clip"})


def open_inputs(file: OnnxFile) -> list[Any]:
    """The graph's inputs that have no initializer, as ValueInfoProtos."""
    return [value for value in file.model.graph.input if value.name not in file.main.constants]


def type_of(value: Any) -> str:
    """An input's or output's type as text, such as `int64[batch, length]`."""
    if not value.type.HasField("tensor_type"):
        return str(value.type.WhichOneof("value") or "a value of unknown type").removesuffix("_type")
    kind = value.type.tensor_type
    name = {"float": "float32", "double": "float64"}.get(_element(value), _element(value))
    sizes = [size.dim_param or (str(size.dim_value) if size.HasField("dim_value") else "?") for size in kind.shape.dim]
    return f"{name}[{', '.join(sizes)}]"


def why_not_runnable(file: OnnxFile) -> str | None:
    """Why no inputs can be made for a file, or its outputs not be compared, from its types alone; or None."""
    for value, what in [(v, "input") for v in open_inputs(file)] + [(v, "output") for v in file.model.graph.output]:
        if not value.type.HasField("tensor_type") or _element(value) not in (*_FLOATS, *_INTEGERS, "bool"):
            return f"its {what} {value.name} is {type_of(value)}, expected numbers that numpy has a type for"
    return None


def samples(file: OnnxFile, module: Run, count: int, seed: int) -> list[dict[str, Tensor]]:
    """`count` inputs that the module takes. Raises UsageError with what onnxruntime said where none were found."""
    said = ""
    for first, others in _SIZES:
        try:
            made = [_sample(file, first, others, seed + i) for i in range(count)]
            for one in made:
                module(**one)
            return made
        except UsageError as error:
            said = said or str(error)
    raise UsageError(said)


def _sample(file: OnnxFile, first: int, others: int, seed: int) -> dict[str, Tensor]:
    import torch

    generator, sizes = torch.Generator().manual_seed(seed), dict[str, int]()
    values = open_inputs(file)
    for value in values:
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            if size.dim_param and not size.HasField("dim_value"):
                sizes.setdefault(size.dim_param, others if axis else first)
    made = {}
    for value in values:
        shape = []
        for axis, size in enumerate(value.type.tensor_type.shape.dim):
            fixed = size.HasField("dim_value")
            shape.append(size.dim_value if fixed else _size(size.dim_param, sizes, others if axis else first))
        made[value.name] = _values(file, value, shape, generator)
    return made


def _size(text: str, sizes: dict[str, int], default: int) -> int:
    """The size of an axis that is named, or a sum of names and numbers."""
    parts = [part.strip() for part in text.split("+")]
    if len(parts) > 1 and all(re.fullmatch(r"\w+", part) for part in parts):
        return sum(int(part) if part.isdigit() else sizes.get(part, default) for part in parts)
    return sizes.get(text, default)


def _values(file: OnnxFile, value: Any, shape: list[int], generator: Any) -> Tensor:
    import torch

    name = _element(value)
    if name == "bool":
        return torch.ones(shape, dtype=torch.bool)
    if name in _FLOATS:
        dtype = {"float": torch.float32, "double": torch.float64, "float16": torch.float16}[name]
        return torch.randn(shape, generator=generator).to(dtype)
    dtype = getattr(torch, name)
    if rows := min(_rows_looked_up(file.main, value.name), default=0):
        return torch.randint(min(rows, torch.iinfo(dtype).max), shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype)


def _rows_looked_up(scope: Scope, name: str) -> Iterator[int]:
    """The sizes of all constant tables in which a value is an index."""
    for reader in scope.readers.get(name, ()):
        node = reader.node
        if node.op_type == "Gather" and reader.at == 1:
            table = reader.scope.constant(node.input[0])
            if table is not None and dtype_of(table) != "int64":  # those are shapes
                yield table.dims[attribute(node, "axis", 0)]
        elif node.op_type in _SAME_SHAPE and reader.at == 0:
            yield from _rows_looked_up(reader.scope, node.output[0])


def _element(value: Any) -> str:
    import onnx

    return str(onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)).lower()


def usable(module: Run, inputs: dict[str, Tensor], tolerance: float) -> str | None:
    """Why the outputs for these inputs are no proof: they differ from one run to the next; or None."""
    from sparsec.pipeline import relative_difference

    one, other = module(**inputs), module(**inputs)
    for name, value in one.items():
        if relative_difference(other[name], value) > tolerance:
            return f"its output {name} differs from one run to the next"
    return None
