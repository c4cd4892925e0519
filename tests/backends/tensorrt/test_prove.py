"""The proof that a user makes on a GPU: all of it that needs none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorrt_models import GOLDEN

from sparsec.backend import Check
from sparsec.backends.tensorrt import driver, proof, prove
from sparsec.backends.tensorrt.layers import table
from sparsec.backends.tensorrt.log import parse
from sparsec.backends.tensorrt.network import Product, Target
from sparsec.backends.tensorrt.script import script
from sparsec.errors import UsageError
from sparsec.store import seal

TIMES = [{"sizes": "x 8x128x768", "dense_ms": 1.5, "sparse_ms": 1.0, "turns": 20}]
MEASURED = {"tensorrt": "10.13.2", "gpu": "NVIDIA A100", "layers": "2 of 2 products are eligible", "times": TIMES}


class Steady:
    """An engine of known speed, which notes when it ran."""

    def __init__(self, name: str, milliseconds: float, order: list[str]) -> None:
        self._name, self._milliseconds, self._order = name, milliseconds, order

    def milliseconds(self, runs: int) -> float:
        self._order.append(self._name)
        return self._milliseconds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"a model")
    return tmp_path


def test_a_proof_is_shown_in_one_line(folder: Path) -> None:
    proof.write(folder, MEASURED)

    (line,) = proof.words(folder)
    assert (
        "TensorRT 10.13.2 on NVIDIA A100: 2 of 2 products are eligible; 1.50x as fast as dense at x 8x128x768" in line
    )
    assert [Check("tensorrt: proof", True, line)] == proof.check(folder)
    assert ["model.onnx", "proof.json"] == sorted(path.name for path in folder.iterdir())


def test_without_a_proof_nothing_is_shown(folder: Path) -> None:
    assert [] == proof.words(folder) == proof.check(folder)


def test_a_proof_of_another_model_is_not_believed(folder: Path) -> None:
    proof.write(folder, MEASURED)
    (folder / "model.onnx").write_bytes(b"another model")

    (check,) = proof.check(folder)
    assert not check.ok
    assert "is of another model.onnx" in check.detail


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "sparsec-tensorrt-proof", "version": 2}'])
def test_a_damaged_proof_is_said_to_be_damaged(folder: Path, text: str) -> None:
    (folder / "proof.json").write_text(text)

    assert not proof.check(folder)[0].ok
    assert 1 == len(proof.words(folder))


def test_a_proof_that_lacks_a_figure_is_damaged(folder: Path) -> None:
    proof.write(folder, {**MEASURED, "times": [{"sizes": "x", "dense_ms": 1.0, "sparse_ms": 0}]})

    assert "damaged" in proof.check(folder)[0].detail


def test_both_engines_are_timed_in_turns_and_neither_is_always_second() -> None:
    order: list[str] = []
    engines = {"sparse": Steady("sparse", 2.0, order), "dense": Steady("dense", 3.0, order)}

    assert {"sparse": 2.0, "dense": 3.0} == prove.alternate(engines, turns=3)
    assert ["sparse", "dense", "sparse", "dense", "dense", "sparse", "sparse", "dense"] == order


def test_inputs_are_repeated_to_the_usual_and_the_largest_sizes() -> None:
    inputs = {"ids": torch.arange(6).view(2, 3), "scale": torch.ones(1)}

    found = prove.cases(inputs, {"ids": ([1, 1], [2, 4], [4, 6])})

    assert ["ids 2x4, scale 1", "ids 4x6, scale 1"] == list(found)
    assert [0, 1, 2, 0] == found["ids 2x4, scale 1"]["ids"][0].tolist()


def test_the_proof_holds_the_table_and_the_logs_own_words() -> None:
    text = (GOLDEN / "tensorrt-10-11.txt").read_text()
    site = Target("up.weight", "linear", (0, 1), (1, 512, 320), "2:4", "")
    rows = table([Product(site, "node_Gemm_8", "float16", 320, 512, True)], parse(text), "tensorrt")

    found = prove.describe(rows, text)

    assert "1 of 1 products are eligible for 2:4, 1 of them run sparse" == found["layers"]
    assert 4 == len(found["log"])
    assert json.loads(json.dumps(found["table"]))[0]["chosen"] is True


def test_settings_are_those_of_the_artifact() -> None:
    facts = {"precision": "model", "shapes": {"x": [[1], [2], [3]]}}

    assert ("tensorrt", True, "fp16") == (lambda s: (s.driver, s.sparse, s.precision))(prove.settings_of(facts, "fp16"))
    assert {"x": [[1], [2], [3]]} == prove.settings_of(facts).shapes
    with pytest.raises(UsageError, match="expected model, fp16 or bf16"):
        prove.settings_of(facts, "int4")


def test_the_script_has_the_options_of_the_build() -> None:
    settings = driver.Settings("tensorrt", precision="fp16", workspace_mb=512, refit=True, strip=True)

    text = script("model.onnx", settings)

    for option in ("--fp16", "--memPoolSize=workspace:512", "--refit", "--stripWeights"):
        assert option in text
    assert "--stronglyTyped --" not in text
    assert "minShapes" not in text


@pytest.mark.skipif(driver.gpus() > 0, reason="there is a GPU")
def test_without_tensorrt_or_a_gpu_the_command_fails_with_one_paragraph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = {"sites": [], "backends": {"tensorrt": {"precision": "model"}}, "inputs": [], "recipe": {}}
    seal(tmp_path, "sparsec-artifact", artifact)

    assert 2 == prove.main([str(tmp_path)])
    said = capsys.readouterr().err
    assert said.startswith("prove: nothing can be proven here: ")
    assert 1 == said.count("\n")


def test_an_artifact_without_tensorrt_has_nothing_to_prove(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seal(tmp_path, "sparsec-artifact", {"sites": [], "backends": {"kernel": {}}, "inputs": [], "recipe": {}})

    assert 2 == prove.main([str(tmp_path)])
    assert "holds kernel, not tensorrt; compile it with --backend tensorrt" in capsys.readouterr().err
