"""Peers must compute what the dense model computes: what they are compared in is time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VOCABULARY, Encoder, Tied, made, random

import sparsec
from sparsec import peers
from sparsec.errors import ArtifactError
from sparsec.pipeline import relative_difference

FP32 = 1e-6  # of the largest output: sums of at most 6 products, reordered
INT8 = 0.3  # of the largest output: rounding costs a hundredth, but without VNNI pairs of products saturate at 16 bits
OPTIONS = sparsec.Options(measure_speed=False, allow_dense=True)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    tokens = torch.randint(0, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    out = tmp_path_factory.mktemp("encoder") / "e.sparsec"
    dynamic = {"tokens": {0: "batch", 1: "length"}}
    return sparsec.compile(made(Encoder), {"tokens": tokens}, pattern="2:4", out=out, dynamic=dynamic, options=OPTIONS)


def linears(program: Any, operator: str) -> int:
    return sum(str(node.target) == operator for node in program.module.graph.nodes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2)])
def test_prepacked_layers_give_the_dense_outputs(
    encoder: sparsec.Artifact, shape: tuple[int, int], tmp_path: Path
) -> None:
    dense = peers.DenseModel(encoder, tmp_path)
    inputs = {"tokens": torch.arange(shape[0] * shape[1]).view(shape) % VOCABULARY}
    with torch.no_grad():
        expected, packed = dense.program(**inputs), peers.MODELS["mkldnn"](dense, inputs)
        found = packed(**inputs)

    assert 7 == linears(dense.program, "aten.linear.default")  # the dense graph is not touched
    assert 7 == linears(packed, "mkldnn._linear_pointwise.default")
    assert all(relative_difference(found[name], value) <= FP32 for name, value in expected.items())


def test_a_shared_weight_is_prepacked_once(tmp_path: Path) -> None:
    artifact = sparsec.compile(made(Tied), {"x": random(3, 6)}, pattern="1:2", out=tmp_path / "t", options=OPTIONS)
    dense = peers.DenseModel(artifact, tmp_path)
    with torch.no_grad():
        packed = peers.MODELS["mkldnn"](dense, dense.program.inputs)

    names = [str(node.target) for node in packed.module.graph.find_nodes(op="get_attr")]
    assert 1 == sum(name.endswith("_reordered_3") for name in names)


@pytest.mark.slow
def test_an_artifact_without_onnx_is_exported_and_quantized(encoder: sparsec.Artifact, tmp_path: Path) -> None:
    dense = peers.DenseModel(encoder, tmp_path)
    inputs = {"tokens": torch.arange(6).view(2, 3)}
    with torch.no_grad():
        expected = dense.program(**inputs)
        for name, tolerance in (("onnxruntime", FP32), ("onnxruntime-int8", INT8)):
            found = peers.MODELS[name](dense, inputs)(**inputs)

            assert all(relative_difference(found[key], value) <= tolerance for key, value in expected.items()), name
    assert dense.session(dense.onnx) is dense.session(dense.onnx)


@pytest.mark.parametrize("name", peers.LAYERS)
@pytest.mark.parametrize(("rows", "cols", "tokens"), [(5, 7, 1), (16, 33, 9)])
def test_every_peer_multiplies_one_layer(
    name: str, rows: int, cols: int, tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "MOST_COPIES", 2)
    weight, x = random(rows, cols), random(tokens, cols, seed=1)
    with torch.no_grad():
        layer = peers.LAYERS[name](weight, tokens, tmp_path)
        results = [layer(x) for _ in range(3)]  # each copy, and the first again

    tolerance = INT8 if name == "onnxruntime-int8" else FP32
    for found in results:
        value = found["y"] if isinstance(found, dict) else found
        assert relative_difference(value, x @ weight.T) <= tolerance


def test_every_call_takes_the_next_copy() -> None:
    layer = peers.in_rotation([lambda x, i=i: i for i in range(3)])

    assert [0, 1, 2, 0] == [layer(random(1)) for _ in range(4)]


@given(st.integers(1, 1 << 30))
def test_copies_fill_the_caches_and_no_more(nbytes: int) -> None:
    count = peers.copies_of(nbytes)

    assert count == peers.MOST_COPIES or count * nbytes >= peers.COLD_BYTES > (count - 1) * nbytes


def test_a_file_that_is_no_model_is_named_by_onnxruntimes_own_words(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no model")

    with pytest.raises(ArtifactError, match=r"onnxruntime cannot quantize this model: \w+: .+"):
        peers.quantize(tmp_path / "x.onnx", tmp_path / "y.onnx")
