"""What TensorRT finds in the ONNX file: which node multiplies with which site's weight, and whether that is 2:4."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.pattern import NM

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

TWO_OF_FOUR = NM(2, 4)
CONVOLUTIONS = ("conv1d", "conv2d")  # whose patterns run along the kernel too, where TensorRT's run along channels
_PRODUCTS = ("Gemm", "MatMul", "Conv")  # the nodes whose weights TensorRT looks at
_CONSTANT = ("Transpose", "DequantizeLinear", "Cast", "Identity", "Reshape", "Slice", "Split", "Gather", "Squeeze")
"""Nodes that TensorRT computes once, where their input is a weight."""
_POINTWISE = ("Add", "Relu", "Gelu", "Clip", "Reshape", "Mul", "Sigmoid", "Tanh")
"""Nodes that TensorRT takes into the product before them."""


@dataclass(frozen=True)
class Target:
    """A site, as a program or a manifest has it."""

    name: str
    kind: str
    axes: tuple[int, ...]
    shape: tuple[int, int, int]
    """(batch, rows, cols)."""
    pattern: str | None
    dense_because: str


@dataclass(frozen=True)
class Product:
    """A site's weight in the ONNX file, and the node that multiplies with it."""

    target: Target
    node: str | None
    """None where no Gemm, MatMul or Conv reads the weight."""
    dtype: str
    inputs: int
    """Along which 2:4 runs: input features, or input channels of a group."""
    outputs: int
    two_of_four: bool
    """Whether at most 2 of every 4 consecutive inputs of an output are nonzero."""
    quantized: bool = False
    """Whether the weight comes through a DequantizeLinear."""
    int8_out: bool = False
    """Whether a QuantizeLinear follows, so that the product may leave int8."""


def targets_of(program: Program) -> list[Target]:
    """The sites of a program."""
    return [
        Target(s.name, s.kind, s.view.axes, s.shape, str(s.pattern) if s.pattern else None, s.excluded or "")
        for s in program.sites
    ]


def targets_in(manifest: dict[str, Any]) -> list[Target]:
    """The sites that a manifest lists."""
    return [
        Target(s["name"], s["kind"], tuple(s["view"]["axes"]), tuple(s["shape"]), s["pattern"], s["excluded"] or "")
        for s in manifest["sites"]
    ]


class Network:
    """An ONNX file whose weights are read one at a time, from external data too."""

    def __init__(self, path: Path) -> None:
        import onnx

        model = onnx.load(str(path), load_external_data=False)
        self._folder = path.parent
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in model.graph.node:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def products(self, targets: Iterable[Target]) -> list[Product]:
        """One for each node that multiplies with a site's weight, in the order of the sites."""
        return [product for target in targets for product in self._products(target)]

    def weight(self, target: Target) -> Tensor | None:
        """The site's weight with its input channels last, (outputs, inputs); None where the file has none."""
        import onnx
        import torch

        tensor = self._initializers.get(self._stored(target.name))
        if tensor is None:
            return None
        array = onnx.numpy_helper.to_array(tensor, base_dir=str(self._folder))
        if tensor.data_type == onnx.TensorProto.BFLOAT16:  # which torch does not take from numpy
            weight = torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
        else:
            weight = torch.from_numpy(array.copy())
        if target.kind in CONVOLUTIONS:
            return weight.movedim(1, -1).flatten(0, -2)
        return weight.permute(target.axes).reshape(-1, target.shape[2])

    def weights(self, targets: Iterable[Target]) -> Iterable[Tensor]:
        """The weights of these sites that the file has."""
        return (weight for target in targets if (weight := self.weight(target)) is not None)

    def _stored(self, name: str) -> str:
        """The initializer that holds a weight: onnxruntime's quantizer renames it."""
        return name if name in self._initializers else f"{name}_quantized"

    def _products(self, target: Target) -> list[Product]:
        import onnx

        weight = self.weight(target)
        if weight is None:
            return [Product(target, None, "", target.shape[2], target.shape[1], False)]
        stored = self._stored(target.name)
        dtype = onnx.TensorProto.DataType.Name(self._initializers[stored].data_type).lower()
        inputs = weight.shape[1]
        sparse = not TWO_OF_FOUR.violations(weight[None]).count if target.pattern else False
        common = (dtype, inputs, target.shape[1], sparse)
        found = [
            Product(target, node.name, *common, quantized, self._quantizes(node.output[0]))
            for node, quantized in self._multipliers(stored)
        ]
        return found or [Product(target, None, *common)]

    def _multipliers(self, name: str, quantized: bool = False) -> Iterable[tuple[Any, bool]]:
        """The products that read a constant, at most through nodes that TensorRT computes once."""
        for node in self._readers.get(name, ()):
            if node.op_type in _PRODUCTS:
                yield node, quantized
            elif node.op_type in _CONSTANT and node.input[0] == name:
                for output in node.output:
                    yield from self._multipliers(output, quantized or node.op_type == "DequantizeLinear")

    def _quantizes(self, name: str) -> bool:
        """Whether all that reads a value quantizes it, at most after pointwise nodes."""
        readers = self._readers.get(name, ())
        return bool(readers) and all(
            node.op_type == "QuantizeLinear" or (node.op_type in _POINTWISE and self._quantizes(node.output[0]))
            for node in readers
        )
