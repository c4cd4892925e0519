"""The hf backend: what it writes is what plain transformers loads, and every fault in it is found by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from zoo import ZOO

import sparsec
from sparsec import api, inspection, store
from sparsec.backends.hf import writing
from sparsec.backends.hf.checks import _config_faults
from sparsec.errors import RecipeError, UsageError
from sparsec.pattern import Pattern
from sparsec.recipe import Recipe, make_backend

QUICK = api.Options(measure_speed=False)


def compiled(folder: Path, out: Path, **changes: Any) -> sparsec.Artifact:
    data = {"model": str(folder), "targets": {"*": "2:4"}, "backends": ["hf"], **changes}
    return api.compile_recipe(Recipe.from_data(data), out, QUICK)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the zoo as a folder; `architectures` names its class."""
    model = ZOO[name]().model.to(dtype)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a pooler that its head does not read, in several shards, with files of all sorts beside."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 70}
    path = tmp_path_factory.mktemp("origin")
    model = BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes))
    model.save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(["[UNK]", "[PAD]"]))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text("{}")
    (path / "modeling_mine.py").write_text("raise SystemExit")
    (path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/base\nwidget: []\n---\n# What it was\n")
    (path / "pytorch_model.bin").write_bytes(b"no weights")
    return path


@pytest.fixture(scope="module")
def artifact(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "small.sparsec"
    return compiled(origin, out, targets={"*": "16:2:5", "re:attention.output": "2:4"}).root


def test_what_two_patterns_keep_is_measured(origin: Path, tmp_path: Path) -> None:
    made = compiled(origin, tmp_path / "x.sparsec", targets={"*": "16:2:5+1:4"})
    declared = json.loads((made.root / "hf/config.json").read_text())["sparsec_config"]
    weights = load_file(made.root / "hf/model.safetensors")
    sites = [weights[name] for name in declared["sites"]]

    assert all(check.ok for check in made.verify())
    assert declared["pattern"] == "16:2:5+1:4"
    kept = sum(int(weight.count_nonzero()) for weight in sites) / sum(weight.numel() for weight in sites)
    assert kept == pytest.approx(declared["keep"])
    assert kept != pytest.approx(Pattern.parse("16:2:5+1:4").density, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", "bf16"),
        ("gpt2", "fp32"),
        *(pytest.param(n, "fp32", marks=pytest.mark.slow) for n in ("t5", "mixtral")),
    ],
)
def test_plain_transformers_loads_it_and_computes_the_same(name: str, dtype: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "origin", torch.bfloat16 if dtype == "bf16" else torch.float32)
    made = compiled(tmp_path / "origin", tmp_path / "x.sparsec", dtype=dtype)

    again, loading = type(model).from_pretrained(tmp_path / "x.sparsec/hf", output_loading_info=True)
    assert not any(loading.values()), loading
    assert again.dtype == model.dtype
    inputs = ZOO[name]().other_inputs()
    with torch.no_grad():
        found, expected = made.load()(**inputs), again.eval()(**inputs)
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    state = again.state_dict()
    for site in made.manifest["sites"]:
        if site["pattern"]:
            weight = state[site["name"]].permute(*site["view"]["axes"]).reshape(site["shape"])
            assert not Pattern.parse("2:4").violations(weight).count
    ties = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    tied = {n: id(p) for n, p in again.named_parameters(remove_duplicate=False)}
    assert len(set(ties.values())) == len(set(tied.values()))


def test_the_configuration_is_the_origins_with_ours_in_it(origin: Path, artifact: Path) -> None:
    before, after = (json.loads((path / "config.json").read_text()) for path in (origin, artifact / "hf"))
    ours = after.pop("sparsec_config")

    assert {**before, "dtype": "float32"} == after
    assert {"version": 1, "sparsec": sparsec.__version__, "pattern": None} == {
        key: ours[key] for key in ("version", "sparsec", "pattern")
    }
    assert ours["sites"]["bert.encoder.layer.0.attention.output.dense.weight"] == "2:4"
    assert 0.4 < ours["keep"] < 0.5
    assert transformers.AutoConfig.from_pretrained(artifact / "hf").sparsec_config == ours


def test_data_files_are_copied_and_code_and_pickles_are_not(artifact: Path) -> None:
    found = {str(path.relative_to(artifact / "hf")) for path in (artifact / "hf").rglob("*") if path.is_file()}

    assert found == {"config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json", "README.md"}


def test_the_card_is_of_this_model_and_its_recipe_makes_it_again(origin: Path, artifact: Path, tmp_path: Path) -> None:
    text = (artifact / "hf/README.md").read_text()
    (tmp_path / "recipe.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    again = Recipe.read(tmp_path / "recipe.yaml", str(origin))

    assert text.startswith("---\nlibrary_name: transformers\nlicense: mit\nbase_model: someone/base\ntags:\n")
    assert (str(origin), {"*": "16:2:5", "re:attention.output": "2:4"}) == (again.model, again.targets)
    assert "| ffn.up | 2 | 70 x 36 | 16:2:5 |" in text
    assert "from transformers import BertForMaskedLM" in text


def test_shards_are_small_and_hold_what_one_file_holds(origin: Path, artifact: Path, tmp_path: Path) -> None:
    program = sparsec.Program.load(sparsec_program(origin, tmp_path))
    writing.write(program, tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    whole = load_file(artifact / "hf/model.safetensors")
    parts: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert {name for name, place in index["weight_map"].items() if place == file.name} == set(opened.keys())
        parts |= load_file(file)

    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert max(sum(t.nbytes for t in load_file(file).values()) for file in files) <= 20_000
    assert sum(t.nbytes for t in parts.values()) == index["metadata"]["total_size"]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    transformers.BertForMaskedLM.from_pretrained(tmp_path / "hf")


def sparsec_program(origin: Path, folder: Path) -> Path:
    from sparsec.models import load_model

    program = load_model(str(origin)).program
    sites = program.sites.with_targets({"*": "16:2:5", "re:attention.output": "2:4"})
    return sparsec.PassManager.parse("mask | freeze").run(program.replace(sites=sites)).save(folder / "program")


@pytest.mark.parametrize("renamed", [False, True])
def test_parameters_that_the_graph_does_not_read_come_from_the_origin(renamed: bool, tmp_path: Path) -> None:
    """A ViT's mask token is read in training only. A checkpoint of the classifier has it under another name."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, mlp_ratio=2
    )
    model = Dinov2ForImageClassification(config)
    torch.nn.init.normal_(model.dinov2.embeddings.mask_token)
    (model if renamed else model.dinov2).save_pretrained(tmp_path / "origin")
    written = json.loads((tmp_path / "origin/config.json").read_text())
    (tmp_path / "origin/config.json").write_text(json.dumps({**written, "architectures": ["Dinov2Model"]}))
    made = compiled(tmp_path / "origin", tmp_path / "x.sparsec")
    state = load_file(tmp_path / "x.sparsec/hf/model.safetensors")

    assert "embeddings.mask_token" in {e["name"] for e in made.manifest["exclusions"] if e["role"] == "unused"}
    assert torch.equal(model.dinov2.embeddings.mask_token, state["embeddings.mask_token"])
    assert model.dinov2.state_dict().keys() == state.keys()


def test_a_parameter_that_the_checkpoint_lacks_and_nothing_reads_is_left_out(tmp_path: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, mlp_ratio=2
    )
    state = Dinov2Model(config).state_dict()
    del state["embeddings.mask_token"]
    Dinov2Model(config).save_pretrained(tmp_path / "origin", state_dict=state)
    made = compiled(tmp_path / "origin", tmp_path / "x.sparsec")

    assert ["embeddings.mask_token"] == made.manifest["backends"]["hf"]["left_out"]
    assert all(check.ok for check in made.verify())


def test_every_site_is_said_to_run_dense(artifact: Path) -> None:
    sites = json.loads((artifact / "manifest.json").read_text())["sites"]
    verdicts = [site["verdicts"]["hf"] for site in sites if site["pattern"]]

    assert 12 <= len(verdicts)
    assert not any(verdict["sparse"] for verdict in verdicts)
    assert all("multiplies the zeros too" in verdict["reason"] for verdict in verdicts)


def change_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.weight"][0] = 1.0
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def drop_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["bert.encoder.layer.0.output.dense.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def quantize(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))


@pytest.mark.parametrize(
    ("damage", "failed", "words"),
    [
        (change_weight, {"hf: patterns", "hf: weights", "hf: outputs in transformers"}, "layer.0.output.dense.weight"),
        (drop_weight, {"hf: patterns", "hf: weights", "hf: transformers", "hf: outputs in transformers"}, "is missing"),
        (truncate, {"hf: files"}, "cannot be read"),
    ],
)
def test_what_was_damaged_is_found_even_with_right_hashes(
    artifact: Path, tmp_path: Path, damage: Any, failed: set[str], words: str
) -> None:
    broken = tmp_path / "broken.sparsec"
    shutil.copytree(artifact, broken)
    damage(broken / "hf")
    manifest = json.loads((broken / "manifest.json").read_text())
    store.seal(broken, "sparsec-artifact", {k: v for k, v in manifest.items() if k != "files"})
    bad = [check for check in sparsec.verify(broken) if not check.ok]

    assert failed == {check.name for check in bad}
    assert words in bad[0].detail


def test_a_quantization_config_is_a_fault(artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact / "hf", tmp_path / "hf")
    quantize(tmp_path / "hf")

    assert any("quantization_config" in fault for fault in _config_faults(tmp_path / "hf", {}))


def test_the_folder_is_inspected_and_verified_like_any_other(artifact: Path, tmp_path: Path) -> None:
    kind, found = inspection.inspect(artifact / "hf")
    patterns = {each.name: str(each.pattern) for each in found if each.sparse}

    assert kind == "weights"
    assert patterns["bert.encoder.layer.0.attention.output.dense.weight"] == "2:4"
    with pytest.raises(UsageError, match="--pattern"):
        inspection.verify(artifact / "hf", None)
    checks = inspection.verify(artifact / "hf", "16:2:5")
    assert {"bert.encoder.layer.0.output.dense.weight"} <= {check.name for check in checks if check.ok}


def test_a_model_that_is_not_from_hugging_face_is_refused_before_any_pass(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))

    with pytest.raises(UsageError, match=r"backend hf cannot write this model: Sequential is no Hugging Face model"):
        sparsec.compile(net, [torch.zeros(2, 8)], pattern="2:4", backends=["hf"], out=tmp_path / "x.sparsec")
    assert list(tmp_path.iterdir()) == []


def test_a_shard_of_no_size_is_refused() -> None:
    with pytest.raises(RecipeError, match="shard_megabytes is 0; expected 1 or more"):
        make_backend("hf{shard_megabytes=0}")
