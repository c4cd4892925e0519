"""One packed linear layer as an ONNX file, built by hand, so that tests can also build it wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from sparsec.backends.onnx.functions import DOMAIN, LINEAR, functions
from sparsec.backends.onnx.packed import linear_attributes
from sparsec.layout import SparseLayout, compress, decompress
from sparsec.pattern import NM, Pattern

OPSET = 20


def a_layout(pattern: Pattern, rows: int, cols: int, seed: int = 0) -> SparseLayout:
    weight = torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(seed))
    return compress(weight, pattern, pattern.project(weight.abs()))


def a_bias(rows: int) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(1))


def expected(layout: SparseLayout, x: Tensor) -> Tensor:
    return torch.nn.functional.linear(x, decompress(layout)[0], a_bias(layout.shape[1]))


def packed_model(
    layout: SparseLayout,
    lead: Sequence[str | int] = ("tokens",),
    change: dict[str, Any] | None = None,
    inputs: Sequence[str] = (),
) -> bytes:
    """y = NMLinear(x), x: (*lead, cols). `change`: other tables, other attributes; `inputs`: tables that are inputs."""
    _, rows, cols = layout.shape
    tables: dict[str, Any] = {name: tensor.numpy() for name, tensor in layout.tensors().items()}
    if isinstance(layout.pattern, NM):
        tables["columns"] = np.arange(layout.pattern.m, dtype=np.uint8).reshape(1, 1, 1, -1)
    tables["bias"] = a_bias(rows).numpy()
    facts = linear_attributes(layout.pattern, cols)
    for name, value in (change or {}).items():
        (facts if name in facts else tables)[name] = value
    node = helper.make_node(LINEAR, ["x", *tables], ["y"], name="up", domain=DOMAIN, **facts)
    node.input[:] = ["x", "values", "positions", "columns", "bias"]
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}{i}" for i in range(tables[name].ndim)])
        for name in inputs
    ]
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*lead, "width"]), *given],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*lead, rows])],
        [numpy_helper.from_array(array, name) for name, array in tables.items() if name not in inputs],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions(OPSET), ir_version=9)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content
