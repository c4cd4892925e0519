"""Folders with compressed or masked weights load as plain ones do, bit for bit, and what cannot be read is named."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_files import blocks, compressed, masked, modelopt, pruned24
from safetensors.torch import load_file, save_file
from task_models import bert
from transformers import AutoConfig, BertModel

from sparsec import inspection, pretrained
from sparsec.errors import ArtifactError, UsageError
from sparsec.migrating import folders
from sparsec.models import load_model

CODECS = ["sparse-24-bitmask", "sparse-bitmask"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(bert(tmp_path_factory.mktemp("origin")))


def weights(folder: Path, file: Path | str = "") -> dict[str, torch.Tensor]:
    """What transformers makes of a folder once it can read it."""
    model, info = BertModel.from_pretrained(pretrained.readable(str(folder), str(file)), output_loading_info=True)
    assert not any(info.values())
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("where", ["quantization_config", "compression_config", ""])
def test_a_compressed_folder_is_imported_bit_exactly(codec: str, where: str, origin: Path, tmp_path: Path) -> None:
    state = compressed(origin, tmp_path / "old", codec, where)
    plain = folders.plain(tmp_path / "old")
    found = {name: value for file in plain.glob("*.safetensors") for name, value in load_file(file).items()}

    assert state.keys() == found.keys()
    assert all(torch.equal(value.view(torch.uint8), found[name].view(torch.uint8)) for name, value in state.items())
    assert json.loads((origin / "config.json").read_text()) == json.loads((plain / "config.json").read_text())
    assert (plain / "tokenizer.json").read_bytes() == (origin / "tokenizer.json").read_bytes()
    assert plain == folders.plain(tmp_path / "old")  # once in a process
    assert str(tmp_path / "old") == folders.source_of(str(plain))


def test_transformers_gets_every_weight_of_it(origin: Path, tmp_path: Path) -> None:
    state = compressed(origin, tmp_path / "old", "sparse-24-bitmask", quant_method="compressed-tensors")
    found = weights(tmp_path / "old")

    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], weight) for name, weight in found.items())


def test_a_plain_folder_is_left_where_it_is(origin: Path) -> None:
    assert origin == folders.plain(origin)
    assert str(origin) == folders.source_of(str(origin))


def test_an_uncompressed_folder_that_speaks_of_sparsity_loads(origin: Path, tmp_path: Path) -> None:
    """Such a config.json makes transformers ask for a package, though nothing is compressed."""
    compressed(origin, tmp_path / "old", "sparse-bitmask")
    config = json.loads((tmp_path / "old/config.json").read_text())
    config["quantization_config"] |= {"quant_method": "compressed-tensors"}
    config["quantization_config"]["sparsity_config"]["format"] = "dense"
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    (tmp_path / "old/model.safetensors").write_bytes((origin / "model.safetensors").read_bytes())

    found, expected = weights(tmp_path / "old"), load_file(origin / "model.safetensors")
    assert all(torch.equal(expected[name], weight) for name, weight in found.items())


def test_what_inspect_shows_is_what_the_model_computes_with(origin: Path, tmp_path: Path) -> None:
    state = compressed(origin, tmp_path / "old", "sparse-24-bitmask")
    kind, found = inspection.inspect(tmp_path / "old")
    patterns = {one.name: str(one.pattern) for one in found if one.sparse}

    assert "weights" == kind
    assert {name: tuple(value.shape) for name, value in state.items() if value.dim() == 2} == {
        one.name: one.shape for one in found
    }
    assert {"2:4"} == set(patterns.values())
    assert all(check.ok for check in inspection.verify(tmp_path / "old", "2:4"))


@pytest.mark.parametrize(
    ("codec", "config", "said"),
    [
        ("marlin-24", {}, r"by the codec 'marlin-24'; sparsec reads sparse-24-bitmask, sparse-bitmask, dense"),
        ("sparse-bitmask", {"config_groups": {"a": {}}, "format": "int-quantized"}, r"quantized too \(int-quantized\)"),
        ("sparse-bitmask", {"quantization_config": {"config_groups": {"a": {}}, "format": "x"}}, r"too \(x\)"),
    ],
)  # fmt: skip
def test_a_codec_that_is_not_known_is_named(
    codec: str, config: dict[str, Any], said: str, origin: Path, tmp_path: Path
) -> None:
    compressed(origin, tmp_path / "old", codec, **config)
    with pytest.raises(UsageError, match=said):
        load_model(str(tmp_path / "old"))


def test_a_file_that_misses_a_part_or_a_weight_is_refused(origin: Path, tmp_path: Path) -> None:
    compressed(origin, tmp_path / "old", "sparse-24-bitmask")
    stored = load_file(tmp_path / "old/model.safetensors")
    shape = next(name for name in stored if name.endswith(".shape"))
    save_file({name: value for name, value in stored.items() if name != shape}, tmp_path / "old/model.safetensors")
    with pytest.raises(ArtifactError, match=rf"{shape} is not: a file is missing or damaged"):
        load_model(str(tmp_path / "old"))
    base = shape.removesuffix(".shape")
    save_file({n: v for n, v in stored.items() if not n.startswith(base)}, tmp_path / "old/model.safetensors")
    with pytest.raises(UsageError, match=rf"2 of the model's weights are not in it, the first is {base}.bias"):
        load_model(str(tmp_path / "old"))


def test_a_temporary_folder_that_cannot_be_written_is_named(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed(origin, tmp_path / "old", "sparse-bitmask")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ArtifactError, match=r"could not be decoded to a temporary folder: No such file.*set TMPDIR"):
        folders.plain(tmp_path / "old")


@pytest.mark.parametrize("shard", [1, 10_000])
def test_shards_are_small_and_hold_everything(
    shard: int, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = compressed(origin, tmp_path / "old", "sparse-24-bitmask")
    monkeypatch.setattr(folders, "_SHARD_BYTES", shard)
    files = [load_file(file) for file in folders.plain(tmp_path / "old").glob("*.safetensors")]

    assert sorted(state) == sorted(name for file in files for name in file)
    assert all(len(file) == 1 or sum(one.nbytes for one in file.values()) <= shard for file in files)


# Weights in place of the model's --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["modelopt", "state", "safetensors"])
def test_a_masked_state_dict_takes_the_place_of_the_weights(kind: str, origin: Path, tmp_path: Path) -> None:
    state = masked(origin)
    file = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pth")
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save(modelopt(origin) if kind == "modelopt" else state, file)
    for name, weight in weights(origin, file).items():
        expected = pruned24(state[name]) if name in blocks(state) else state[name]
        assert torch.equal(expected.view(torch.uint8), weight.view(torch.uint8))
    patterns = {str(one.pattern) for one in inspection.inspect(file)[1] if one.sparse}
    assert {"2:4"} == patterns


def test_a_folder_whose_weights_have_masks_beside_them_loads(origin: Path, tmp_path: Path) -> None:
    state = masked(origin)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((origin / "config.json").read_bytes())
    found = weights(tmp_path)

    assert 6 == len(blocks(found))
    assert all(torch.equal(pruned24(state[name]), found[name]) for name in blocks(found))


def test_weights_of_another_model_or_for_another_kind_of_model_are_refused(origin: Path, tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(
        UsageError, match=r"other.pth: 23 of the model's weights .* it holds fc.weight: expected .* BertModel"
    ):
        load_model(str(origin), weights=str(tmp_path / "other.pth"))
    with pytest.raises(UsageError, match=r"--weights w.pth is for a Hugging Face MODEL; models:net comes with its own"):
        load_model("models:net", weights="w.pth")
    with pytest.raises(ArtifactError, match=r"nowhere.safetensors cannot be read"):
        load_model(str(origin), weights=str(tmp_path / "nowhere.safetensors"))


def test_an_adapter_is_no_model_and_the_error_says_how_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"an adapter that peft wrote.*merge-adapter\{adapter="):
        load_model(str(tmp_path))


def test_a_compressed_model_of_a_hub_is_downloaded_whole(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hub is asked: what it would give lies in a folder."""
    import huggingface_hub

    state = compressed(origin, tmp_path / "old", "sparse-bitmask")
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(tmp_path / "old")
    )
    monkeypatch.setattr(pretrained, "read_config", lambda _: AutoConfig.from_pretrained(tmp_path / "old"))
    plain = Path(pretrained.readable("nobody/old", ""))

    assert [("nobody/old", {"allow_patterns": list(pretrained._DATA)})] == asked
    assert state.keys() == json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"].keys()
