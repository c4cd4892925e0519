"""onnxsim on an ONNX model that holds each linear layer's weight in a MatMul: it prunes files, not modules."""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxsim import pruning
from torch import Tensor, nn

from oneshot.job import Batch, Job
from oneshot.loading import load_model

PACKAGES = ("onnxsim", "onnx")


class Onnxsim:
    def __init__(self, job: Job, given: list[Batch]) -> None:
        if job.method != "magnitude":
            raise ValueError(f"onnxsim is compared by magnitude only, found {job.method}")
        self.beside: dict[str, float] = {}
        self.model: Any = load_model(job.folder)
        self.kept, self.of = map(int, job.pattern.split(":"))
        linear = {name: part for name, part in self.model.named_modules() if isinstance(part, nn.Linear)}
        self.names = [f"{name}.weight" for name in linear if "lm_head" not in name and "pooler" not in name]
        weights = dict(self.model.named_parameters())
        self.onnx = _matmuls({name: weights[name].detach() for name in self.names})

    def forward(self, batch: Batch) -> None:
        self.model(**batch)

    def prune(self) -> None:
        self.onnx = pruning.apply_magnitude_pruning(self.onnx, n=self.kept, m=self.of)

    def tensors(self) -> dict[str, Tensor]:
        stored = {one.name: one for one in self.onnx.graph.initializer}
        read = {node.output[0]: node.input[1] for node in self.onnx.graph.node}
        found: dict[str, Tensor] = dict(self.model.named_parameters())
        for name in self.names:
            found[name] = torch.from_numpy(numpy_helper.to_array(stored[read[f"{name} y"]]).copy()).T
        return found


def _matmuls(weights: dict[str, Tensor]) -> onnx.ModelProto:
    """x @ W^T for every weight (rows, cols), each with an input and an output of its own."""
    nodes, inputs, outputs, stored = [], [], [], []
    for name, weight in weights.items():
        rows, cols = weight.shape
        nodes.append(helper.make_node("MatMul", [f"{name} x", name], [f"{name} y"]))
        inputs.append(helper.make_tensor_value_info(f"{name} x", TensorProto.FLOAT, ["tokens", cols]))
        outputs.append(helper.make_tensor_value_info(f"{name} y", TensorProto.FLOAT, ["tokens", rows]))
        stored.append(numpy_helper.from_array(weight.T.contiguous().numpy(), name))
    graph = helper.make_graph(nodes, "layers", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def load(job: Job, given: list[Batch]) -> Onnxsim:
    return Onnxsim(job, given)
