"""The operators of packed weights as functions of the file, in standard operators, so that any runtime can run them.

    weight = NMWeight <v, m, in_features> (values, positions, columns)
        values, positions, columns: the canonical tables of `layout`, (batch, rows, ...), values in float32;
        weight: (batch * rows, in_features). v: rows that share columns, 0 for N:M. m: columns are offsets in groups of
        m; 0: they are columns of the weight (strips).
    y = NMLinear <v, n, m, in_features> (x, values, positions, columns, bias)
        x: (tokens, in_features); tables of one matrix, values in float32 or bfloat16; bias: (rows,); y = x W^T + bias.

A runtime folds NMWeight when it loads the file, so its form was chosen by load time (tests/bench/bench_onnx_load.py,
docs/results/onnx.md): few tensors of the size of the weight, none of 64 bits, no broadcast along the last axis, and a
weight that Gemm takes as it is.

1. Positions are taken apart with a table of 256 rows, a byte each; positions of 3, 5, 6 or 7 bits, which straddle
   bytes, are summed up from parts that do not.
2. Columns are looked up in one flat table of all blocks, in which all are columns of the weight.
3. A spare slot of a tail may name the column of another slot (or, cut off, of none): it adds its 0.
"""

from __future__ import annotations

from typing import Any

DOMAIN, LINEAR, WEIGHT = "sparsec", "NMLinear", "NMWeight"

_HEAD = '<domain: "sparsec", opset_import: ["": {opset}, "sparsec": 1]>'

WEIGHT_TEXT = (
    _HEAD
    + """
NMWeight <v, m, in_features> (values, positions, columns) => (weight)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    axis_0 = Constant <value_ints = [0]> ()
    axis_1 = Constant <value_ints = [1]> ()
    axis_2 = Constant <value_ints = [2]> ()
    flat = Constant <value_ints = [-1]> ()
    flat_column = Constant <value_ints = [-1, 1]> ()
    powers = Constant <value_ints = [1, 2, 4, 8, 16, 32, 64, 128, 256]> ()
    width = Constant <value_int: int = @in_features> ()
    group_size = Constant <value_int: int = @m> ()
    block = Constant <value_int: int = @v> ()

    batch = Shape <start = 0, end = 1> (values)
    rows = Shape <start = 1, end = 2> (values)
    groups = Shape <start = 2, end = 3> (values)
    kept = Shape <start = 3, end = 4> (values)
    bytes = Shape <start = 2, end = 3> (positions)
    column_batches = Shape <start = 0, end = 1> (columns)
    strips = Shape <start = 1, end = 2> (columns)
    slots = Shape <start = 3, end = 4> (columns)
    batch_count = Squeeze (batch)
    row_count = Squeeze (rows)
    group_count = Squeeze (groups)
    all_rows = Mul (batch, rows)
    fields = Mul (groups, kept)
    table_shape = Concat <axis = 0> (all_rows, fields)

    too_few = Less (powers, slots)
    ones = Cast <to = 7> (too_few)
    bits = ReduceSum <keepdims = 1> (ones)
    part_sizes = Constant <value_ints = [8, 1, 2, 1, 4, 1, 2, 1, 8]> ()
    part_bits = Gather <axis = 0> (part_sizes, bits)
    parts = Div (bits, part_bits)
    byte_bits = Constant <value_ints = [8]> ()
    per_byte = Div (byte_bits, part_bits)
    byte_end = Squeeze (byte_bits)
    part_step = Squeeze (part_bits)
    shifts = Range (zero, byte_end, part_step)
    divisors = Gather <axis = 0> (powers, shifts)
    part_values = Gather <axis = 0> (powers, part_bits)
    byte_values = Constant <value_int = 256> ()
    byte_range = Range (zero, byte_values, one)
    byte_column = Unsqueeze (byte_range, axis_1)
    shifted = Div (byte_column, divisors)
    parts_of_byte_64 = Mod (shifted, part_values)
    parts_of_byte = Cast <to = 6> (parts_of_byte_64)
    packed = Cast <to = 6> (positions)
    by_byte = Gather <axis = 0> (parts_of_byte, packed)
    unpacked_count = Mul (bytes, per_byte)
    unpacked_shape = Concat <axis = 0> (all_rows, unpacked_count)
    unpacked = Reshape <allowzero = 1> (by_byte, unpacked_shape)
    used = Mul (fields, parts)
    in_use = Slice (unpacked, axis_0, used, axis_1)
    used_count = Squeeze (used)
    part_ids = Range (zero, used_count, one)
    part_count = Max (parts, one)
    part_of_field = Mod (part_ids, part_count)
    part_shift = Mul (part_of_field, part_bits)
    part_factor_64 = Gather <axis = 0> (powers, part_shift)
    part_factor = Cast <to = 6> (part_factor_64)
    scaled = Mul (in_use, part_factor)
    by_part_shape = Concat <axis = 0> (all_rows, fields, parts)
    by_part = Reshape <allowzero = 1> (scaled, by_part_shape)
    position = ReduceSum <keepdims = 0> (by_part, axis_2)

    columns_64 = Cast <to = 7> (columns)
    group_ids = Range (zero, group_count, one)
    group_starts = Mul (group_ids, group_size)
    starts = Unsqueeze (group_starts, axis_1)
    absolute = Add (columns_64, starts)
    last_column = Sub (width, one)
    in_range = Min (absolute, last_column)
    lookup_64 = Reshape (in_range, flat)
    lookup = Cast <to = 6> (lookup_64)
    block_rows = Max (block, one)
    row_ids = Range (zero, row_count, one)
    row_strip = Div (row_ids, block_rows)
    last_strip = Sub (strips, one)
    strip = Min (row_strip, last_strip)
    batch_ids = Range (zero, batch_count, one)
    last_batch = Sub (column_batches, one)
    column_batch = Min (batch_ids, last_batch)
    batch_strips = Mul (column_batch, strips)
    batch_start = Unsqueeze (batch_strips, axis_1)
    strip_of_all = Add (batch_start, strip)
    strip_size = Mul (groups, slots)
    row_start = Mul (strip_of_all, strip_size)
    row_base_64 = Reshape (row_start, flat_column)
    row_base = Cast <to = 6> (row_base_64)
    field_count = Squeeze (fields)
    field_ids = Range (zero, field_count, one)
    field_group = Div (field_ids, kept)
    field_start = Mul (field_group, slots)
    field_base = Cast <to = 6> (field_start)
    base = Add (row_base, field_base)
    slot = Add (position, base)
    column = Gather <axis = 0> (lookup, slot)

    kept_values = Reshape (values, table_shape)
    width_1 = Unsqueeze (width, axis_0)
    dense_shape = Concat <axis = 0> (all_rows, width_1)
    zeros = ConstantOfShape (dense_shape)
    weight = ScatterElements <axis = 1, reduction = "add"> (zeros, column, kept_values)
}}
"""
)

LINEAR_TEXT = (
    _HEAD
    + """
NMLinear <v, n, m, in_features> (x, values, positions, columns, bias) => (y)
{{
    floats = Cast <to = 1> (values)
    weight = sparsec.NMWeight <v: int = @v, m: int = @m, in_features: int = @in_features> (floats, positions, columns)
    y = Gemm <transB = 1> (x, weight, bias)
}}
"""
)


def functions(opset: int) -> list[Any]:
    """The operators as functions in standard operators of this version, 18 or later, as onnx's objects."""
    return [function(text, opset) for text in (WEIGHT_TEXT, LINEAR_TEXT)]


def function(text: str, opset: int) -> Any:
    """A function from its text, as a file holds it: the two can be compared."""
    import onnx
    from onnx_ir import serde

    parsed = onnx.parser.parse_function(text.format(opset=opset))
    return serde.serialize_function(serde.deserialize_function(parsed))
