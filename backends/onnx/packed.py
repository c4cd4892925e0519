"""Sparse weights of an ONNX model as packed tables, multiplied by the operator `sparsec::NMLinear`.

1. The operator is also a function of the file, written in standard operators: any runtime unpacks the tables when it
   loads the file, and multiplies densely. onnxruntime with sparsec's library (`sparsec.ort`) runs a sparse kernel.
2. A weight that something other than a Gemm reads, or whose pattern has no kernel, stays dense.
3. N:M needs no columns; it gets the offsets 0 .. M-1 in their place, so that one function serves every pattern.

    y = NMLinear <v, n, m, in_features> (x, values, positions, columns, bias)
        x: (..., in_features); values, positions, columns: the canonical tables of `layout`; bias: (rows,);
        y: (..., rows). v is 0 for N:M.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsec.pattern import NM, VNM, Pattern

if TYPE_CHECKING:
    from sparsec.layout import SparseLayout

DOMAIN, OPERATOR = "sparsec", "NMLinear"

_FUNCTION = """
<domain: "sparsec", opset_import: ["": {opset}]>
NMLinear <v, n, m, in_features> (x, values, positions, columns, bias) => (y)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    eight = Constant <value_int = 8> ()
    powers = Constant <value_ints = [1, 2, 4, 8, 16, 32, 64, 128, 256]> ()
    group_size = Constant <value_int: int = @m> ()
    width = Constant <value_int: int = @in_features> ()
    block = Constant <value_int: int = @v> ()

    rows = Shape <start = 1, end = 2> (values)
    groups = Shape <start = 2, end = 3> (values)
    kept = Shape <start = 3, end = 4> (values)
    strips = Shape <start = 1, end = 2> (columns)
    slots = Shape <start = 3, end = 4> (columns)
    row_count = Squeeze (rows)
    group_count = Squeeze (groups)
    fields = Mul (groups, kept)
    field_count = Squeeze (fields)

    too_few = Less (powers, slots)
    ones = Cast <to = 7> (too_few)
    bits = ReduceSum <keepdims = 0> (ones)
    field_ids = Range (zero, field_count, one)
    bit = Mul (field_ids, bits)
    byte = Div (bit, eight)
    next_byte = Add (byte, one)
    bit_in_byte = Mod (bit, eight)
    below_wide = Gather (powers, bit_in_byte)
    size_wide = Gather (powers, bits)
    below = Cast <to = 6> (below_wide)
    size = Cast <to = 6> (size_wide)
    two = Constant <value_ints = [2]> ()
    spare_shape = Concat <axis = 0> (rows, two)
    spare = ConstantOfShape <value = uint8[1] {{0}}> (spare_shape)
    packed = Squeeze (positions, first)
    bytes = Concat <axis = 1> (packed, spare)
    low_byte = Gather <axis = 1> (bytes, byte)
    high_byte = Gather <axis = 1> (bytes, next_byte)
    low = Cast <to = 6> (low_byte)
    high = Cast <to = 6> (high_byte)
    carry = Constant <value = int32 {{256}}> ()
    high_part = Mul (high, carry)
    word = Add (low, high_part)
    shifted = Div (word, below)
    field = Mod (shifted, size)
    table_shape = Concat <axis = 0> (rows, groups, kept)
    position = Reshape (field, table_shape)

    no_block = Max (block, one)
    row_ids = Range (zero, row_count, one)
    strip_ids = Div (row_ids, no_block)
    strip_count = Squeeze (strips)
    last_strip = Sub (strip_count, one)
    strip = Min (strip_ids, last_strip)
    offsets_by_strip = Squeeze (columns, first)
    offsets_by_row = Gather <axis = 0> (offsets_by_strip, strip)
    offsets_shape = Concat <axis = 0> (rows, groups, slots)
    offsets = Expand (offsets_by_row, offsets_shape)
    chosen = GatherElements <axis = 2> (offsets, position)
    offset = Cast <to = 7> (chosen)
    group_ids = Range (zero, group_count, one)
    starts_flat = Mul (group_ids, group_size)
    starts = Unsqueeze (starts_flat, second)
    column = Add (offset, starts)

    flat_shape = Concat <axis = 0> (rows, fields)
    flat_column = Reshape (column, flat_shape)
    flat_values = Reshape (values, flat_shape)
    padded_width = Mul (groups, group_size)
    padded_shape = Concat <axis = 0> (rows, padded_width)
    zeros = ConstantOfShape (padded_shape)
    padded = ScatterElements <axis = 1, reduction = "add"> (zeros, flat_column, flat_values)
    end = Unsqueeze (width, first)
    weight = Slice (padded, first, end, second)

    transposed = Transpose <perm = [1, 0]> (weight)
    product = MatMul (x, transposed)
    y = Add (product, bias)
}}
"""


def function(opset: int) -> Any:
    """The operator as a function in standard operators of this version, 18 or later, as onnx's object."""
    import onnx
    from onnx_ir import serde

    parsed = onnx.parser.parse_function(_FUNCTION.format(opset=opset))
    return serde.serialize_function(serde.deserialize_function(parsed))  # as a file holds it: the two can be compared


def attributes(pattern: Pattern, cols: int) -> dict[str, int]:
    """The node's attributes for a weight of this pattern, N:M or V:N:M, with so many columns."""
    assert isinstance(pattern, (NM, VNM))
    v = pattern.v if isinstance(pattern, VNM) else 0
    return {"v": v, "n": pattern.n, "m": pattern.m, "in_features": cols}


def table_names(name: str, pattern: Pattern) -> list[str]:
    """The initializers of a weight's values, positions and columns (rule 3)."""
    columns = f"sparsec.offsets_{pattern.m}" if isinstance(pattern, NM) else f"{name}_columns"
    return [f"{name}_values", f"{name}_positions", columns]


def to_packed_onnx(model: Any, layouts: Mapping[str, SparseLayout]) -> dict[str, str]:
    """Replace every Gemm on a weight of `layouts` by the operator on its tables. Edits `model`, an onnx_ir.Model.

    `layouts`: name of the initializer -> what it holds, fp32. Returns the weights that stay dense, each with its reason
    (rule 2). The numbers do not change: the tables decompress to the same bits.
    """
    import onnx_ir

    dense = {}
    for name, layout in layouts.items():
        weight = model.graph.initializers[name]
        gemms = [node for node, _ in weight.uses()]
        if reason := _why_dense(layout, [_why_no_gemm(node, weight, layout) for node in gemms]):
            dense[name] = reason
            continue
        tables = _tables(model.graph, name, layout)
        for gemm in gemms:
            _replace(model.graph, gemm, tables, layout)
        del model.graph.initializers[name]
    if len(dense) < len(layouts):
        made = onnx_ir.serde.deserialize_function(function(model.opset_imports[""]))
        model.functions[made.identifier()] = made
        model.opset_imports[DOMAIN] = 1
    return dense


def _why_dense(layout: SparseLayout, faults: list[str | None]) -> str | None:
    if not isinstance(layout.pattern, (NM, VNM)):
        return f"{layout.pattern} has no packed operator"
    if layout.shape[0] != 1:
        return f"it holds {layout.shape[0]} matrices"
    return next((fault for fault in faults if fault), None if faults else "nothing reads it")


def _why_no_gemm(node: Any, weight: Any, layout: SparseLayout) -> str | None:
    """Why a reader is not x W^T + bias with a bias of (rows,), or None."""
    if node.op_type != "Gemm" or node.domain or list(node.inputs).index(weight) != 1:
        return f"{node.op_type} reads it, not as the weight of a Gemm"
    found = {name: attribute.value for name, attribute in node.attributes.items()}
    # The weight as stored is (rows, cols), or (cols, rows) in GPT-2's Conv1D.
    rows_first = found.get("transB", 0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    _, rows, cols = layout.shape
    plain = found.get("alpha", 1.0) == found.get("beta", 1.0) == 1.0 and not found.get("transA", 0)
    plain = plain and tuple(weight.shape) == ((rows, cols) if rows_first else (cols, rows))
    return (
        None
        if plain and (bias is None or tuple(bias.shape or ()) == (rows,))
        else "its Gemm does more than x W^T + bias"
    )


def _tables(graph: Any, name: str, layout: SparseLayout) -> list[Any]:
    import numpy

    arrays = [tensor.numpy() for tensor in layout.tensors().values()]
    if isinstance(layout.pattern, NM):
        arrays.append(numpy.arange(layout.pattern.m, dtype="uint8").reshape(1, 1, 1, -1))
    names = table_names(name, layout.pattern)
    return [_initializer(graph, *named) for named in zip(names, arrays, strict=True)]


def _initializer(graph: Any, name: str, array: Any) -> Any:
    import onnx_ir

    if name not in graph.initializers:
        graph.register_initializer(onnx_ir.Value(name=name, const_value=onnx_ir.tensor(array, name=name)))
    return graph.initializers[name]


def _replace(graph: Any, gemm: Any, tables: list[Any], layout: SparseLayout) -> None:
    import numpy
    import onnx_ir

    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is None:
        bias = _initializer(graph, f"sparsec.zeros_{layout.shape[1]}", numpy.zeros(layout.shape[1], "float32"))
    facts = attributes(layout.pattern, layout.shape[2]).items()
    inputs, settings = [gemm.inputs[0], *tables, bias], [onnx_ir.AttrInt64(*fact) for fact in facts]
    node = onnx_ir.Node(DOMAIN, OPERATOR, inputs, settings, name=gemm.name)
    onnx_ir.convenience.replace_nodes_and_values(graph, gemm, [gemm], [node], gemm.outputs, node.outputs)
