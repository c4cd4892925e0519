"""ONNX files as others write them, built by hand: small graphs with weights in all the places they are found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21


def weight(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def node(operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> Any:
    return helper.make_node(operator, inputs, outputs, name=f"the_{outputs[0]}", **attributes)


def a_file(
    path: Path,
    nodes: Sequence[Any],
    tensors: Mapping[str, Any],
    x: Sequence[int | str] = ("batch", 8),
    y: Sequence[str] = ("y",),
    rank: int = 2,
    opset: int = OPSET,
    external: bool = False,
    inputs: Sequence[Any] = (),
    domains: Sequence[str] = (),
    functions: Sequence[Any] = (),
) -> Path:
    """y = nodes(x), both float32. `tensors`: arrays, or TensorProtos, by name."""
    made = [t if isinstance(t, TensorProto) else numpy_helper.from_array(t, name) for name, t in tensors.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in y]
    entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, x)
    graph = helper.make_graph(nodes, "made", [entry, *inputs], outputs, made)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    if external:
        name = f"{path.name}_data"
        onnx.save(model, path, save_as_external_data=True, location=name, size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def array(path: Path, name: str) -> Any:
    """An initializer of a file, external data included."""
    model = onnx.load(path)
    return numpy_helper.to_array(next(one for one in model.graph.initializer if one.name == name))


def two_layers(path: Path, external: bool = False, **extra: Any) -> Path:
    """MatMul (8 -> 12), Relu, Gemm with transB (12 -> 6): the second is the head."""
    tensors = {"up": weight(8, 12), "down": weight(6, 12, seed=1), "bias": weight(6, seed=2)}
    nodes = [
        node("MatMul", ["x", "up"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "down", "bias"], ["y"], transB=1),
    ]
    return a_file(path, nodes, tensors | extra, external=external)
