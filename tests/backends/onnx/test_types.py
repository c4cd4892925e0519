"""Programs in half precision, and weights rounded to bfloat16: what the file holds, what runs, what is proven."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import sparsec
from sparsec import store
from sparsec.api import Options
from sparsec.artifact import Artifact
from sparsec.backend import CHECK_FILE, CheckData
from sparsec.backends.onnx.session import OnnxModule
from sparsec.errors import ArtifactError
from sparsec.recipe import make_backend


class Net(nn.Module):
    """A linear layer, GPT-2's way to write one, a strip, a convolution; floating-point input."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.conv = nn.Linear(12, 20), nn.Linear(20, 12), nn.Conv1d(12, 8, 3, groups=2)
        self.down = nn.Parameter(torch.randn(12, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.mix(torch.relu(self.up(x)))
        hidden = torch.addmm(self.up.bias[:12], hidden.flatten(0, 1), self.down).unflatten(0, (x.shape[0], x.shape[1]))
        found: Tensor = self.conv(hidden.transpose(1, 2))
        return found


TARGETS = {"up.weight": "2:4", "mix.weight": "4:2:5@strip", "down": "4:2:5", "conv.weight": "1:4"}
BOTH = ["packed", pytest.param("dense", marks=pytest.mark.slow)]
KINDS = {"packed": ["NMLinear", "NMLinear", "NMWeight", "NMWeight"], "dense": []}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Artifact]:
    """Compile once what several tests look at."""
    return cache(lambda *what, **settings: compiled(tmp_path_factory.mktemp("types"), *what, **settings))


def compiled(folder: Path, dtype: torch.dtype, weights: str, **settings: Any) -> Artifact:
    torch.manual_seed(0)
    return sparsec.compile(
        Net().to(dtype), [torch.randn(2, 5, 12).to(dtype)], targets=TARGETS, passes="mask | freeze",
        backends=["kernel", f"onnx{{weights={weights}}}"], out=folder / "a", options=Options(measure_speed=False),
        dynamic={"x": {0: "batch"}}, **settings,
    )  # fmt: skip


def operators(artifact: Artifact) -> list[str]:
    return sorted(node.op_type for node in model(artifact).graph.node if node.domain == "sparsec")


def model(artifact: Artifact) -> onnx.ModelProto:
    return onnx.load(str(artifact.root / "model.onnx"))


def details(artifact: Artifact) -> dict[str, str]:
    found = artifact.verify()
    assert [check for check in found if not check.ok] == []
    return {check.name.removeprefix("onnx: "): check.detail for check in found}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_a_float16_model_is_written_and_runs_in_float16(made: Callable[..., Artifact], weights: str) -> None:
    artifact = made(torch.float16, weights)

    assert {"float16"} == {str(value.dtype).removeprefix("torch.") for value in run(artifact).values()}
    assert "allowed 5e-03" in details(artifact)["outputs in onnxruntime"]
    assert KINDS[weights][2:] * 2 == operators(artifact)  # no kernel takes float16 activations
    types = {tensor.name: tensor.data_type for tensor in model(artifact).graph.initializer}
    assert onnx.TensorProto.FLOAT16 == types["up.weight_values" if weights == "packed" else "up.weight"]
    assert artifact.manifest["backends"]["onnx"]["nbytes_sparse"] == (
        sum(site["nbytes_sparse" if weights == "packed" else "nbytes_dense"] for site in artifact.manifest["sites"])
    )


def run(artifact: Artifact) -> dict[str, Tensor]:
    found: dict[str, Tensor] = artifact.load(backend="onnx")(torch.randn(3, 5, 12).half())
    return found


@pytest.mark.parametrize("weights", BOTH)
def test_a_bfloat16_model_is_written_and_verify_says_what_it_could_run(
    made: Callable[..., Artifact], weights: str
) -> None:
    artifact = made(torch.bfloat16, weights)

    said = details(artifact)
    assert "break no count of their pattern" in said["patterns"]
    assert "equal the kernel backend's packed tables bit for bit" in said["packed tables"]
    with pytest.raises(ArtifactError, match=r"onnxruntime \S+ has no kernel for \w+ in bfloat16 .* --dtype fp16"):
        OnnxModule(artifact.root / "model.onnx")  # as of onnxruntime 1.31; where it loads, this test must change
    assert "what is proven is the same graph in float32: largest relative" in said["outputs in onnxruntime"]


@pytest.mark.parametrize("weights", BOTH)
def test_a_broken_bfloat16_file_is_noticed_without_bfloat16_kernels(
    made: Callable[..., Artifact], tmp_path: Path, weights: str
) -> None:
    artifact = made(torch.bfloat16, weights)
    broken = model(artifact)
    (bias,) = [tensor for tensor in broken.graph.initializer if tensor.name == "mix.bias"]
    bias.raw_data = torch.full((12,), 9.0).bfloat16().view(torch.uint16).numpy().tobytes()
    onnx.save(broken, str(tmp_path / "model.onnx"))

    checks = make_backend("onnx").verify(tmp_path, artifact.manifest, stored(artifact))
    assert ["onnx: outputs in onnxruntime"] == [c.name for c in checks if not c.ok and "kernels" not in c.name]


def stored(artifact: Artifact) -> CheckData:
    return CheckData.from_tensors(store.load_tensors(artifact.root / CHECK_FILE))


@pytest.mark.parametrize("weights", BOTH)
def test_values_rounded_to_bfloat16_are_what_both_backends_hold(made: Callable[..., Artifact], weights: str) -> None:
    artifact = made(torch.float32, weights, values="bf16")

    said = details(artifact)
    assert "equal the kernel backend's packed tables bit for bit" in said["packed tables"]
    assert KINDS[weights] == operators(artifact)
    types = {tensor.name: tensor.data_type for tensor in model(artifact).graph.initializer}
    if weights == "packed":
        assert onnx.TensorProto.BFLOAT16 == types["up.weight_values"]
        sizes = [site["nbytes_sparse"] for site in artifact.manifest["sites"]]
        assert sum(sizes) == artifact.manifest["backends"]["onnx"]["nbytes_sparse"]
    else:
        assert onnx.TensorProto.FLOAT == types["up.weight"]
    x = torch.randn(3, 5, 12)
    kernel, found = (artifact.load(backend=name)(x)["output"] for name in ("kernel", "onnx"))
    torch.testing.assert_close(found, kernel, rtol=1e-5, atol=1e-5)
