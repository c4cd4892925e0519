"""attach on a GPU: layers on panels, or dense with the reason. The CPU stands in, on the operator's reference."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated24 import compressed, kernels
from models import Residual, made, random
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import sparsec
from sparsec.backend import Parts
from sparsec.backends.kernel import parts
from sparsec.backends.kernel.backend import KernelBackend
from sparsec.backends.kernel.cpu.layer import SparseLinear
from sparsec.backends.kernel.cuda import sharing
from sparsec.backends.kernel.cuda.ceilings import H200
from sparsec.backends.kernel.cuda.destination import Destination
from sparsec.backends.kernel.cuda.install import install_on
from sparsec.errors import UsageError
from sparsec.pipeline import CLOSE_IN, relative_difference
from sparsec.program import read_graph

CPU = torch.device("cpu")


def net() -> nn.Module:
    return made(Residual).bfloat16()


@pytest.fixture
def artifact(tmp_path: Path) -> sparsec.Artifact:
    options = sparsec.Options(measure_speed=False)
    x = random(3, 5).bfloat16()
    return sparsec.compile(net(), [x], pattern="16:2:8", out=tmp_path / "x.sparsec", options=options)


def pretend(monkeypatch: pytest.MonkeyPatch, **known: Any) -> None:
    """The CPU as a GPU of which this is known."""
    make = parts.on_gpu(Destination(CPU, **known))

    def read(_: KernelBackend, folder: Path, manifest: dict[str, Any], device: str) -> Parts:
        return parts.read_parts(folder, manifest, make, sharing.share)

    monkeypatch.setattr(KernelBackend, "parts", read)


def test_an_attached_model_runs_on_panels_and_gives_the_artifacts_outputs(artifact, monkeypatch) -> None:
    pretend(monkeypatch)
    model, x = net(), random(4, 5, seed=1).bfloat16()
    before = {name: id(value) for name, value in model.named_parameters()}
    attached = sparsec.attach(model, artifact.root)
    with torch.no_grad():
        expected, found = artifact.load_dense()(x)["output"], model(x)

    assert 2 == len(attached.layers) and not attached.dense
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    assert 2 == len(layers)
    for layer in layers:
        assert (torch.bfloat16, CPU, torch.uint8) == (layer.weight.dtype, layer.weight.device, layer.stream.dtype)
        assert torch.bfloat16 == layer.unpacked().dtype
    assert relative_difference(found.float(), expected.float()) <= CLOSE_IN["bfloat16"]
    with pytest.raises(UsageError, match=r"for inference in bfloat16 on the CPU; torch.float32 on cpu was asked for"):
        model.float()
    with torch.no_grad():
        assert torch.equal(found, torch.compile(model, backend="eager", fullgraph=True)(x))
    assert (1, 1) == (len(model._forward_pre_hooks), len(model._forward_hooks))
    sparsec.detach(model)
    assert (0, 0) == (len(model._forward_pre_hooks), len(model._forward_hooks))
    assert before == {name: id(value) for name, value in model.named_parameters()}


def test_what_is_predicted_slower_stays_dense_with_the_reason(artifact, monkeypatch, caplog) -> None:
    pretend(monkeypatch, table=dataclasses.replace(H200, l2_bytes=1.0))
    with caplog.at_level(logging.INFO, "sparsec"):
        attached = sparsec.attach(net(), artifact.root)

    assert 2 == len(attached.dense) and not attached.layers
    for reason in attached.dense.values():
        assert "at 1-512 tokens on NVIDIA H200 (a model, not measured); if its layers see others" in reason
        assert reason in caplog.text


def test_int8_values_run_dense_and_say_that_activations_are_not_rounded(tmp_path: Path, monkeypatch) -> None:
    options = sparsec.Options(measure_speed=False)
    x = random(3, 5).bfloat16()
    artifact = sparsec.compile(
        net(), [x], pattern="16:2:8", out=tmp_path / "int8.sparsec", options=options, values="int8"
    )
    pretend(monkeypatch)
    model = net()
    attached = sparsec.attach(model, artifact.root)

    assert 2 == len(attached.dense) and not attached.layers
    for reason in attached.dense.values():
        assert "run dense here, with activations that are not rounded to int8" in reason
    loaded = read_graph(artifact.root)
    verdicts = install_on(loaded, Destination(CPU))
    assert {"reference"} == {one.kernel for one in verdicts.values()}
    with torch.no_grad():
        assert not torch.equal(model(x), loaded(x)["output"]), "loaded on a GPU it rounds them"


class Square(nn.Module):
    """Layers of a shape that torch's 2:4 products take, one of them a Conv1D, whose weight lies the other way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 64), Conv1D(64, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(x).relu()))


def test_what_is_2_4_runs_on_torchs_product_where_that_is_fastest(tmp_path: Path, monkeypatch) -> None:
    """torch's CUTLASS class stands in for its other one, and its product is emulated."""
    x, options = random(16, 64, seed=1).bfloat16(), sparsec.Options(measure_speed=False)
    artifact = sparsec.compile(
        made(Square).bfloat16(), [x], pattern="32:2:8", out=tmp_path / "x.sparsec", options=options
    )
    quick = dataclasses.replace(
        H200, memory_bytes=1.0, sparse_flops=1.0, two_of_four_bytes=1e20, two_of_four_flops=1e20, launch_seconds=1e-12
    )
    pretend(monkeypatch, table=quick, compress=compressed)
    model = made(Square).bfloat16()
    with kernels() as products, torch.no_grad():
        attached = sparsec.attach(model, artifact.root)
        made_by_proof = len(products)
        expected, found = artifact.load_dense()(x)["output"], model.cpu().bfloat16()(x[None])[0]
        weights = {name: model.get_submodule(name).unpacked() for name in ("up", "down")}
    dense = artifact.load_dense()

    assert ("up.weight", "down.weight") == tuple(sorted(attached.layers, reverse=True)) and not attached.dense
    assert made_by_proof + 2 == len(products)
    assert relative_difference(found.float(), expected.float()) <= CLOSE_IN["bfloat16"]
    held = {name: tensor for name, tensor in dense.body.named_buffers() if name.endswith("_dense")}
    assert torch.equal(held["up.weight_dense"], weights["up"])
    assert torch.equal(held["down.weight_dense"].T, weights["down"])
    pretend(monkeypatch, table=quick)
    assert 2 == len(sparsec.attach(made(Square).bfloat16(), artifact.root).dense)

    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pretend(monkeypatch, table=quick, compress=full)
    with pytest.raises(UsageError, match=r"(up|down)\.weight: no memory left on cpu for its 2:4 form"):
        sparsec.attach(made(Square).bfloat16(), artifact.root)


def test_a_model_is_attached_whole_on_one_device(artifact) -> None:
    model = net()
    model.down.to("meta")
    with pytest.raises(UsageError, match=r"up\.weight is on cpu and down\.weight on meta; load the whole model on one"):
        sparsec.attach(model, artifact.root)
    with pytest.raises(UsageError, match="is on meta, the kernels run on the CPU or a CUDA GPU"):
        sparsec.attach(net().to("meta"), artifact.root)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_parts_for_a_gpu_that_is_not_there_are_refused(artifact) -> None:
    with pytest.raises(UsageError, match="cuda:0: no CUDA GPU was found"):
        artifact.parts("cuda:0")


@pytest.mark.slow
def test_a_language_model_generates_with_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model")
    options = sparsec.Options(measure_speed=False)
    recipe = {"passes": "mask | freeze", "dtype": "bf16"}
    artifact = sparsec.compile(
        str(tmp_path / "model"), pattern="16:2:8", out=tmp_path / "x.sparsec", options=options, **recipe
    )
    pretend(monkeypatch)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).eval()
    attached = sparsec.attach(model, artifact.root)
    ids, copies = torch.arange(40)[None] % 50, []
    lay = sharing.side_by_side
    monkeypatch.setattr(sharing, "side_by_side", lambda x: copies.append(x.shape) or lay(x))
    with torch.no_grad():
        model(ids)
        assert 2 * [(1, 40, 64), (1, 40, 64), (1, 40, 64), (1, 40, 96)] == copies  # q k v, o, gate up, down
        prompt, steps = model(ids), model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        expected = artifact.load_dense()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]

    assert 14 == len(attached.layers)
    assert (1, 44) == steps.shape
    assert relative_difference(prompt.logits.float(), expected.float()) <= 2 * CLOSE_IN["bfloat16"]
