"""Sparse weights of an ONNX model as packed tables, in place of the dense initializers.

1. Layers that are one plain product, y = x W^T + bias in float32, of N:M, V:N:M or strip weights become the operator
   `sparsec::NMLinear`: onnxruntime with sparsec's library (`sparsec.ort`) runs a sparse kernel.
2. Every other weight that has tables (convolutions, experts, half precision, strips whose rows moved, weights read
   twice) becomes `sparsec::NMWeight`, which gives the weight itself under its own name. Rows that moved are put back by
   Gather.
3. Both are also functions of the file in standard operators (`functions`): any runtime unpacks the tables when it loads
   the file, and multiplies densely.
4. N:M needs no columns; it gets the offsets 0 .. M-1 in their place, so that one function serves every pattern.
5. What has no tables of this kind stays dense, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.backends.onnx.functions import DOMAIN, LINEAR, WEIGHT, functions
from sparsec.pattern import NM, Pattern, SharedColumns, Strip

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.layout import SparseLayout
    from sparsec.view import WeightView

_LOOKUP_LIMIT = 1 << 31  # columns of all blocks: NMWeight counts them in 32 bits


@dataclass(frozen=True)
class PackedWeight:
    """What an initializer holds, and how: tables of (batch, rows, cols), and the initializer's own axes and shape."""

    layout: SparseLayout
    view: WeightView


def why_dense(pattern: Pattern, shape: tuple[int, int, int]) -> str | None:
    """Why a weight of this pattern and shape (batch, rows, cols) has no packed form in ONNX, or None."""
    if not isinstance(pattern, (NM, SharedColumns)):
        return f"{pattern} has no packed form in ONNX: only N:M, V:N:M and strips have"
    slots = 4 * pattern.strips(shape[1]) if isinstance(pattern, SharedColumns) else pattern.m
    if shape[0] * slots * pattern.groups(shape[2]) >= _LOOKUP_LIMIT:
        return f"its tables name more than {_LOOKUP_LIMIT} columns; {pattern} of {shape} is too large to be unpacked"
    return None


def no_product(pattern: Pattern, moved: bool) -> str | None:
    """Why no kernel of NMLinear multiplies by weights of this pattern, or None. `moved`: with a table of rows."""
    if not isinstance(pattern, (NM, SharedColumns)) or (isinstance(pattern, Strip) and pattern.v % Strip.ROWS):
        return f"the kernels run N:M, V:N:M and strips of a multiple of {Strip.ROWS} rows, not {pattern}"
    return "NMLinear takes no table of rows, and its rows moved (permute{mode=both} moves none)" if moved else None


def linear_attributes(pattern: Pattern, cols: int) -> dict[str, int]:
    """The attributes of NMLinear for a weight of this pattern, with so many columns."""
    assert isinstance(pattern, (NM, SharedColumns))
    facts = weight_attributes(pattern, cols)
    return {"v": facts["v"], "n": pattern.n, "m": facts["m"], "in_features": cols}


def weight_attributes(pattern: Pattern, cols: int) -> dict[str, int]:
    """The attributes of NMWeight for a weight of this pattern, with so many columns."""
    assert isinstance(pattern, (NM, SharedColumns))
    v = pattern.v if isinstance(pattern, SharedColumns) else 0
    return {"v": v, "m": 0 if isinstance(pattern, Strip) else pattern.m, "in_features": cols}


def table_names(name: str, pattern: Pattern) -> list[str]:
    """The initializers of a weight's values, positions and columns (rule 4); that of moved rows is `NAME_places`."""
    columns = f"sparsec.offsets_{pattern.m}" if isinstance(pattern, NM) else f"{name}_columns"
    return [f"{name}_values", f"{name}_positions", columns]


def to_packed_onnx(model: Any, weights: Mapping[str, PackedWeight]) -> set[str]:
    """Put tables in the place of initializers. Edits `model`, an onnx_ir.Model; returns which became NMLinear (rule 1).

    `weights`: name of the initializer -> what it holds; its pattern must have tables (`why_dense`). The numbers do not
    change: the tables decompress to the same bits.
    """
    import onnx_ir

    graph, linear = model.graph, set()
    for name, packed in weights.items():
        weight = graph.initializers[name]
        tables = _tables(graph, name, packed.layout)
        users = [node for node, _ in weight.uses()]
        if _is_linear(packed.layout) and users and all(_is_product(node, weight, packed.layout) for node in users):
            linear.add(name)
            for gemm in users:
                _to_linear(graph, gemm, tables, packed.layout)
            del graph.initializers[name]
        else:
            _to_weight(graph, weight, tables, packed)
    for one in functions(model.opset_imports[""]) if weights else ():
        made = onnx_ir.serde.deserialize_function(one)
        model.functions[made.identifier()] = made
        model.opset_imports[DOMAIN] = 1
    return linear


def _is_linear(layout: SparseLayout) -> bool:
    runs = no_product(layout.pattern, layout.rows is not None) is None
    return runs and layout.shape[0] == 1 and layout.stored in ("fp32", "bf16")


def _is_product(node: Any, weight: Any, layout: SparseLayout) -> bool:
    """Whether a reader is x W^T + bias with x in float32, a weight of its own and a bias of (rows,)."""
    import onnx_ir

    if node.op_type != "Gemm" or node.domain or list(node.inputs).index(weight) != 1:
        return False
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    # The weight as stored is (rows, cols), or (cols, rows) in GPT-2's Conv1D.
    rows_first = found.get("transB", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    _, rows, cols = layout.shape
    plain = found.get("alpha", 1.0) == found.get("beta", 1.0) == 1.0 and not found.get("transA", 0)
    plain = plain and tuple(weight.shape) == ((rows, cols) if rows_first else (cols, rows))
    plain = plain and weight.const_value.dtype == onnx_ir.DataType.FLOAT
    return bool(plain) and (bias is None or tuple(bias.shape or ()) == (rows,))


def _tables(graph: Any, name: str, layout: SparseLayout) -> list[Any]:
    import onnx_ir
    import torch

    arrays = [_tensor(table) for name, table in layout.tensors().items() if name != "rows"]
    if isinstance(layout.pattern, NM):
        arrays.append(onnx_ir.tensor(torch.arange(layout.pattern.m, dtype=torch.uint8).view(1, 1, 1, -1).numpy()))
    names = table_names(name, layout.pattern)
    return [_initializer(graph, *named) for named in zip(names, arrays, strict=True)]


def _tensor(table: Any) -> Any:
    """A torch tensor as onnx_ir's; numpy has no bfloat16 of its own."""
    import onnx_ir
    import torch

    if table.dtype == torch.bfloat16:
        return onnx_ir.Tensor(table.view(torch.uint16).numpy(), dtype=onnx_ir.DataType.BFLOAT16)
    return onnx_ir.tensor(table.numpy())


def _initializer(graph: Any, name: str, tensor: Any) -> Any:
    import onnx_ir

    if name not in graph.initializers:
        tensor.name = name
        graph.register_initializer(onnx_ir.Value(name=name, const_value=tensor))
    return graph.initializers[name]


def places(rows: Tensor) -> Tensor:
    """Where each row of all matrices stands in the tables, (batch * rows,) int32, from `SparseLayout.rows`."""
    import torch

    starts = torch.arange(rows.shape[0], dtype=torch.int32)[:, None] * rows.shape[1]
    return (rows.argsort(1).int() + starts).flatten()


def _to_linear(graph: Any, gemm: Any, tables: list[Any], layout: SparseLayout) -> None:
    """Rule 1."""
    import numpy
    import onnx_ir

    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None:
        zeros = onnx_ir.tensor(numpy.zeros(layout.shape[1], "float32"))
        bias = _initializer(graph, f"sparsec.zeros_{layout.shape[1]}", zeros)
    facts = linear_attributes(layout.pattern, layout.shape[2]).items()
    inputs, settings = [gemm.inputs[0], *tables, bias], [onnx_ir.AttrInt64(*fact) for fact in facts]
    node = onnx_ir.Node(DOMAIN, LINEAR, inputs, settings, name=gemm.name)
    onnx_ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], [node], gemm.outputs, node.outputs)


def _to_weight(graph: Any, weight: Any, tables: list[Any], packed: PackedWeight) -> None:
    """Rule 2: unpack in float32, cast, lay out as the initializer was; the last value takes its name over."""
    import onnx_ir

    layout, view, name, nodes = packed.layout, packed.view, weight.name, list[Any]()

    def add(operator: str, *inputs: Any, domain: str = "", **settings: Any) -> Any:
        attributes = onnx_ir.convenience.convert_attributes(settings)
        nodes.append(onnx_ir.Node(domain, operator, inputs, attributes, name=f"{name}_unpack_{len(nodes)}"))
        return nodes[-1].outputs[0]

    values, positions, columns = tables
    if layout.stored != "fp32":
        values = add("Cast", values, to=int(onnx_ir.DataType.FLOAT))
    facts = weight_attributes(layout.pattern, layout.shape[2])
    value = add(WEIGHT, values, positions, columns, domain=DOMAIN, **facts)
    if layout.rows is not None:
        value = add("Gather", value, _initializer(graph, f"{name}_places", _tensor(places(layout.rows))), axis=0)
    if weight.const_value.dtype != onnx_ir.DataType.FLOAT:
        value = add("Cast", value, to=int(weight.const_value.dtype))
    in_order = [view.parameter[axis] for axis in view.axes]
    if in_order != [math.prod(layout.shape[:2]), layout.shape[2]]:
        value = add("Reshape", value, add("Constant", value_ints=in_order))
    if list(view.axes) != sorted(view.axes):
        value = add("Transpose", value, perm=[view.axes.index(axis) for axis in range(len(view.axes))])
    value.shape, value.dtype = weight.shape, weight.const_value.dtype
    weight.replace_all_uses_with(value)
    del graph.initializers[name]
    value.name = name
    graph.insert_before(graph[0], nodes)
