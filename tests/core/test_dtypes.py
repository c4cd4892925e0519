"""--dtype: what a Hugging Face model is loaded and traced in; weights that are stored so stay in their file."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from memory import resident
from models import Residual, made
from zoo import ZOO

import sparsec
from sparsec import api, backend, mapping
from sparsec.errors import UsageError
from sparsec.models import load_model
from sparsec.recipe import DTYPES, Dtype, Recipe

QUICK = api.Options(measure_speed=False)


def recipe(model: Path, **changes: Any) -> Recipe:
    return Recipe.from_data({"model": str(model), "targets": {"*": "2:4"}, **changes})


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 MB of bf16 weights: more than the noise of loading."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=100, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(path, max_shard_size="20MB")
    return path


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2"))])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_model_is_compiled_in_its_dtype_and_proven(name: str, dtype: Dtype, tmp_path: Path) -> None:
    ZOO[name]().model.save_pretrained(tmp_path / "model")
    found = api.compile_recipe(recipe(tmp_path / "model", dtype=dtype), tmp_path / "x.sparsec", QUICK)
    manifest = found.manifest
    sites = [site for site in manifest["sites"] if site["pattern"]]

    assert manifest["tolerance"] == {"bf16": 2e-2, "fp16": 5e-3}[dtype]
    assert all(check.ok for check in found.verify())
    assert {dtype} == {site["values"] for site in sites}
    assert all(site["nbytes_dense"] == 2 * site["shape"][0] * site["shape"][1] * site["shape"][2] for site in sites)
    assert sum(site["nbytes_sparse"] for site in sites) == manifest["backends"]["kernel"]["nbytes_sparse"]
    assert all("the kernels run float32 only" in site["verdicts"]["kernel"]["reason"] for site in sites)
    module, inputs = found.load(), ZOO[name]().other_inputs()
    outputs = module(**{key: inputs[key] for key in module.input_names})
    assert {f"torch.{DTYPES[dtype]}"} == {str(value.dtype) for value in outputs.values()}


def test_what_is_stored_as_bf16_is_loaded_as_fp32_unless_asked(wide: Path) -> None:
    program = load_model(str(wide)).program

    assert {torch.float32} == {parameter.dtype for parameter in program.module.parameters()}
    assert backend.FP32_TOLERANCE == backend.tolerance_of(program)


def test_weights_stay_in_their_file_until_they_are_read_and_can_go_back(wide: Path) -> None:
    nbytes = sum(path.stat().st_size for path in wide.glob("*.safetensors"))
    load_model(str(wide), dtype="bf16")  # what the first load takes besides
    before = resident("RssAnon")
    program = load_model(str(wide), dtype="bf16").program
    weights = list(program.module.parameters())

    assert resident("RssAnon") - before < nbytes / 4
    assert mapping.release(*weights) > 0
    with torch.no_grad():
        expected = program(**program.inputs)["logits"]
        released = mapping.release(*weights)
        found = program(**program.inputs)["logits"]
    assert released >= 0.9 * nbytes
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "gpt2", "t5"))])
def test_a_mapped_model_computes_what_the_saved_one_does(name: str, tmp_path: Path) -> None:
    case = ZOO[name]()
    case.model.bfloat16().save_pretrained(tmp_path)
    program = load_model(str(tmp_path), dtype="bf16").program
    model = copy.deepcopy(type(case.model).from_pretrained(tmp_path, dtype=torch.bfloat16)).eval()  # in ordinary memory
    inputs = {name: value for name, value in case.other_inputs().items() if name in program.inputs}
    with torch.no_grad():
        expected, found = model(**inputs, use_cache=False), program(**inputs)

    assert 0 == mapping.release(*model.parameters())
    assert all(torch.equal(expected[key], value) for key, value in found.items())


def test_pruning_leaves_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    ZOO["llama"]().model.bfloat16().save_pretrained(tmp_path / "model")
    files = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    api.compile_recipe(recipe(tmp_path / "model", dtype="bf16"), tmp_path / "x.sparsec", QUICK)

    assert files == {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}


def test_a_truncated_checkpoint_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    ZOO["llama"]().model.bfloat16().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)

    with pytest.raises(UsageError, match="the weights cannot be loaded"):
        load_model(str(tmp_path), dtype="bf16")


def test_a_module_is_traced_as_it_is_so_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--dtype bf16 is for Hugging Face models.* with float32 weights"):
        sparsec.compile(made(Residual), [torch.zeros(2, 5)], pattern="2:4", dtype="bf16", out=tmp_path / "x.sparsec")
    sparsec.compile(
        made(Residual).bfloat16(), [torch.zeros(2, 5).bfloat16()], pattern="2:4", dtype="bf16",
        out=tmp_path / "x.sparsec", options=QUICK,
    )  # fmt: skip
    assert ["x.sparsec"] == os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": "int8"}, "--values int8 rounds the sparse weights of a float32 model"),
    ],
)
def test_what_cannot_go_with_a_dtype_is_refused_before_any_pass(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    ZOO["llama"]().model.save_pretrained(tmp_path / "model")

    with pytest.raises(UsageError, match=words):
        api.compile_recipe(recipe(tmp_path / "model", dtype="bf16", **changes), tmp_path / "x.sparsec", QUICK)
    assert ["model"] == os.listdir(tmp_path)
