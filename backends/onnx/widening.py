"""A bfloat16 model.onnx with float32 in its place: the same graph and weights, for a runtime without bfloat16 kernels.

Every bfloat16 number is a float32 number, so only sums and products round otherwise, and less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def widen(source: Path, out: Path) -> None:
    """Write `out`, with its weights beside it: every value, weight, constant and cast of bfloat16 becomes float32."""
    import onnx_ir

    model = onnx_ir.load(source)
    graph = model.graph
    for value in graph.initializers.values():
        if value.const_value.dtype == onnx_ir.DataType.BFLOAT16:
            value.const_value = _wide(value.const_value)
    values = [*graph.inputs, *graph.outputs, *graph.initializers.values()]
    nodes = [*graph.all_nodes(), *(node for one in model.functions.values() for node in one.all_nodes())]
    for value in [*values, *(made for node in nodes for made in node.outputs)]:
        if value.dtype == onnx_ir.DataType.BFLOAT16:
            value.dtype = onnx_ir.DataType.FLOAT
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            node.attributes[name] = _wide_attribute(attribute)
    onnx_ir.save(model, out, external_data=f"{out.name}.data")


def _wide(tensor: Any) -> Any:
    import onnx_ir

    return onnx_ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)


def _wide_attribute(attribute: Any) -> Any:
    import onnx_ir

    narrow = onnx_ir.DataType.BFLOAT16
    if attribute.type == onnx_ir.AttributeType.TENSOR and attribute.value.dtype == narrow:
        return onnx_ir.AttrTensor(attribute.name, _wide(attribute.value))
    if attribute.name in ("to", "dtype") and attribute.value == int(narrow):
        return onnx_ir.AttrInt64(attribute.name, int(onnx_ir.DataType.FLOAT))
    return attribute
