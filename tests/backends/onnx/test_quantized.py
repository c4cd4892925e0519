"""onnxruntime's own quantizer keeps the pattern of a dense file: a zero weight is the integer 0, and 0 stays 0."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor, nn

from sparsec.backends.onnx import exporter
from sparsec.pattern import Pattern
from sparsec.pipeline import PassManager
from sparsec.tracing import trace

TARGETS = {"up.weight": "2:4", "down.weight": "16:2:5"}
SHAPES = {"up.weight": (64, 20), "down.weight": (20, 64)}
INT8_ERROR = 0.1  # of the largest output: 8 bits for weights and activations, no outliers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(20, 64), nn.Linear(64, 20)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(torch.relu(self.up(x)))
        return found


class Data(CalibrationDataReader):
    """16 batches of numbers from -1 to 1: what is tested does not exceed what was seen."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.batches: Iterator[np.ndarray] = iter(generator.uniform(-1, 1, (16, 3, 20)).astype("float32"))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"x": batch}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    program = trace(Net(), {"x": torch.randn(3, 20)}, {"x": {0: "batch"}})
    program = program.replace(sites=program.sites.with_targets(TARGETS))
    out = tmp_path_factory.mktemp("dense") / "model.onnx"
    exporter.export(PassManager.parse("mask | freeze").run(program), out, "dense")
    return out


def quantized(kind: str, source: Path, out: Path) -> onnx.ModelProto:
    model = onnx.load(str(source))
    del model.graph.value_info[:]  # the dynamic quantizer transposes weights, and shapes of before would be wrong
    if kind == "dynamic":
        quantize_dynamic(model, str(out), weight_type=QuantType.QInt8)
    else:
        settings = {"ActivationSymmetric": False, "WeightSymmetric": True}
        quantize_static(
            model, str(out), Data(), QuantFormat.QDQ, per_channel=kind == "static, by row", extra_options=settings
        )
    return onnx.load(str(out))


@pytest.mark.filterwarnings("ignore")  # the quantizer's own
@pytest.mark.parametrize("kind", ["dynamic", "static", "static, by row"])
def test_the_pattern_holds_in_the_integers(dense: Path, tmp_path: Path, kind: str) -> None:
    made = quantized(kind, dense, tmp_path / "int8.onnx")
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.graph.initializer}

    for name, pattern in TARGETS.items():
        (found,) = [array for key, array in tensors.items() if key.startswith(name) and key.endswith("_quantized")]
        weight = torch.from_numpy(found.copy())
        weight = weight if tuple(weight.shape) == SHAPES[name] else weight.T
        zero_points = [array for key, array in tensors.items() if key.startswith(name) and "zero_point" in key]
        assert np.int8 == found.dtype
        assert zero_points
        assert all(not array.any() for array in zero_points)
        assert 0 == Pattern.parse(pattern).violations(weight[None].float()).count
    x = np.random.default_rng(1).uniform(-1, 1, (5, 20)).astype("float32")
    runs = [onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0] for path in (dense, tmp_path / "int8.onnx")]
    assert np.abs(runs[0] - runs[1]).max() <= INT8_ERROR * np.abs(runs[0]).max()
