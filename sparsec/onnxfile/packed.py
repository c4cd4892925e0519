"""Weights that sparsec's own operators NMLinear and NMWeight read as packed tables (see `layout` for the tables).

NMLinear <v, n, m, in_features> (x, values, positions, columns, bias)       v is 0 for N:M
NMWeight <v, m, in_features> (values, positions, columns)                   m is 0 for strips
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import SparseLayout, decompress, validate
from sparsec.onnxfile.opened import OnnxFile, dtype_of
from sparsec.onnxfile.scopes import Scope, attribute, label
from sparsec.pattern import NM, VNM, Pattern, Strip

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN = "sparsec"
_FIRST_TABLE = {"NMLinear": 1, "NMWeight": 0}
_VALUES = "_values"


@dataclass(frozen=True)
class Tables:
    """The tables of one packed weight, all constants of the main graph."""

    name: str
    kind: str
    users: tuple[str, ...]
    layout_pattern: Pattern
    shape: tuple[int, int, int]
    dtype: str
    tensors: tuple[Any, ...]
    """TensorProtos of values, positions and columns; N:M has no columns."""

    def read(self, file: OnnxFile) -> Tensor:
        """The weight (batch, rows, cols) that they hold. Raises ArtifactError where they do not hold one."""
        layout = SparseLayout(self.layout_pattern, self.shape, *(file.tensor(table) for table in self.tensors))
        validate(layout, self.name)
        return decompress(layout)


def tables_of(file: OnnxFile) -> tuple[list[Tables], set[str]]:
    """All packed weights of the main graph, and the names of the constants that make them up."""
    found: dict[str, Tables] = {}
    names: set[str] = set()
    noted = _patterns(file.model)
    for node in file.main.nodes:
        if node.domain != DOMAIN or node.op_type not in _FIRST_TABLE:
            continue
        first = _FIRST_TABLE[node.op_type]
        inputs = [_before_cast(file.main, name) for name in node.input[first : first + 3]]
        tensors = [file.main.constant(name) for name in inputs]
        if len(tensors) < 3 or None in tensors or len(tensors[0].dims) != 4:
            raise ArtifactError(
                f"{file.path}: {label(node)}: the tables of {node.op_type} must be constants of the file"
            )
        name = inputs[0].removesuffix(_VALUES)
        names.update(inputs)
        users = (*(found[name].users if name in found else ()), label(node))
        batch, rows, groups, kept = tensors[0].dims
        pattern = _pattern(node, groups, kept, noted.get(name), f"{file.path}: {name}")
        kept_tables = tuple(tensors[:2] if isinstance(pattern, NM) else tensors)
        shape = (batch, rows, attribute(node, "in_features"))
        found[name] = Tables(name, node.op_type, users, pattern, shape, dtype_of(tensors[0]), kept_tables)
    return list(found.values()), names


def _before_cast(scope: Scope, name: str) -> str:
    maker = scope.makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "Cast" else name


def _pattern(node: Any, groups: int, kept: int, noted: str | None, where: str) -> Pattern:
    v, m, cols = (attribute(node, key, 0) for key in ("v", "m", "in_features"))
    try:
        if v and m:
            return VNM(v, kept, m)
        if m:
            return NM(kept, m)
        said = Pattern.parse(noted) if noted else None
        if isinstance(said, Strip) and said.v == v and said.groups(cols) == groups:
            return said
        return Strip(v, kept, -(-cols // groups))
    except (PatternError, TypeError, ZeroDivisionError) as error:
        raise ArtifactError(f"{where}: its attributes are no pattern: v={v}, m={m}, in_features={cols}") from error


def _patterns(model: Any) -> dict[str, str]:
    """What the file says about its patterns: a strip's M is nowhere else."""
    text = next((entry.value for entry in model.metadata_props if entry.key == "sparsec.patterns"), "{}")
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) else {}
