"""attach on a GPU: layers on panels, or dense with the reason. The CPU stands in, on the operator's reference."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Residual, made, random
from torch import nn

import sparsec
from sparsec.backend import Parts
from sparsec.backends.kernel import backend as kernel_backend
from sparsec.backends.kernel import parts
from sparsec.backends.kernel.backend import KernelBackend
from sparsec.backends.kernel.cpu.layer import SparseLinear
from sparsec.backends.kernel.cuda.ceilings import H200, Ceilings
from sparsec.errors import UsageError
from sparsec.pipeline import CLOSE_IN, relative_difference

CPU = torch.device("cpu")


def net() -> nn.Module:
    return made(Residual).bfloat16()


@pytest.fixture
def artifact(tmp_path: Path) -> sparsec.Artifact:
    options = sparsec.Options(measure_speed=False)
    x = random(3, 5).bfloat16()
    return sparsec.compile(net(), [x], pattern="16:2:8", out=tmp_path / "x.sparsec", options=options)


def pretend(monkeypatch: pytest.MonkeyPatch, table: Ceilings | None = None) -> None:
    """The CPU as a GPU."""
    make = parts.on_gpu(CPU, table, None)

    def read(_: KernelBackend, folder: Path, manifest: dict[str, Any], device: str) -> Parts:
        return parts.read_parts(folder, manifest, make)

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
    sparsec.detach(model)
    assert before == {name: id(value) for name, value in model.named_parameters()}


def test_what_is_predicted_slower_stays_dense_with_the_reason(artifact, monkeypatch, caplog) -> None:
    pretend(monkeypatch, dataclasses.replace(H200, l2_bytes=1.0))
    with caplog.at_level(logging.INFO, "sparsec"):
        attached = sparsec.attach(net(), artifact.root)

    assert 2 == len(attached.dense) and not attached.layers
    for reason in attached.dense.values():
        assert "at 1-512 tokens on NVIDIA H200 (a model, not measured); if its layers see others" in reason
        assert reason in caplog.text


def test_a_model_is_attached_whole_on_one_device(artifact) -> None:
    model = net()
    model.down.to("meta")
    with pytest.raises(UsageError, match=r"up\.weight is on cpu and down\.weight on meta; load the whole model on one"):
        sparsec.attach(model, artifact.root)
    with pytest.raises(UsageError, match="is on meta, the kernels run on the CPU or a CUDA GPU"):
        sparsec.attach(net().to("meta"), artifact.root)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_parts_for_a_gpu_that_is_not_there_are_refused(artifact) -> None:
    kernel_backend.no_gpu.cache_clear()
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
    ids = torch.arange(40)[None] % 50
    with torch.no_grad():
        prompt, steps = model(ids), model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        expected = artifact.load_dense()(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]

    assert 14 == len(attached.layers)
    assert (1, 44) == steps.shape
    assert relative_difference(prompt.logits.float(), expected.float()) <= 2 * CLOSE_IN["bfloat16"]
