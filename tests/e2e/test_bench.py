"""`sparsec bench` as a user runs it: figures for people and machines, and every wrong request in one paragraph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, Encoder, made
from typer.testing import CliRunner

import sparsec
from sparsec.cli import app


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "small.sparsec"
    tokens = torch.randint(0, VOCABULARY, (2, 4), generator=torch.Generator().manual_seed(0))
    options = sparsec.Options(measure_speed=False, allow_dense=True)
    dynamic = {"tokens": {0: "batch", 1: "length"}}
    sparsec.compile(made(Encoder), {"tokens": tokens}, pattern="2:4", out=out, dynamic=dynamic, options=options)
    return str(out)


def test_people_see_ratios_first_then_times_the_best_peer_and_the_machine(artifact: str, tmp_path: Path) -> None:
    plot = tmp_path / "p.svg"
    command = ["bench", artifact, "--against", "dense,mkldnn", "--inputs", "3x5,1x2", "--threads", "1", "--layers"]
    result = CliRunner().invoke(app, [*command, "--seconds", "0.01", "--plot", str(plot)], env={"COLUMNS": "110"})

    assert result.exit_code == 0, result.output
    text = result.stdout
    parts = [
        "times faster than",
        "dense  mkldnn",
        "3 x 5",
        "1 x 2",
        "1 thread: thread CPU time",
        "The best dense fp32 is",
    ]
    parts += ["One product", "4x4", "largest difference from the dense outputs: kernel", "; kernels ", "sparsec 0"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "3 x 5 tokens" in plot.read_text()


def test_machines_get_one_object_with_both_clocks(artifact: str) -> None:
    command = ["bench", artifact, "--against", "dense", "--tokens", "1,4", "--threads", "1,2", "--seconds", "0.01"]
    data = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)

    assert [(1, 1), (1, 4), (2, 1), (2, 4)] == [(row["threads"], row["tokens"]) for row in data["speed"]]
    assert {"kernel", "dense"} == set(data["speed"][0]["seconds"]) == set(data["speed"][0]["wall_seconds"])
    assert {"processor", "cores", "kernels", "torch", "onnxruntime", "sparsec"} <= set(data["machine"])
    assert {} == data["unavailable"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--against dense,tensorflow", "'tensorflow' is nothing to compare with; expected some of dense, mkldnn"),
        ("--threads 0", "--threads 0: expected whole numbers of 1 or more, such as 1,2"),
        ("--threads -2", "--threads -2: expected whole numbers"),
        ("--threads two", "--threads two: expected whole numbers"),
        ("--tokens 0", "--tokens 0: expected whole numbers of 1 or more, such as 1,32,128"),
        ("--tokens 1,,2", "--tokens 1,,2: expected whole numbers"),
        ("--tokens 1 --inputs 1x1", "found both --tokens and --inputs"),
        ("--inputs 8", "--inputs 8: expected whole numbers of 1 or more, such as 8x128,1x16"),
        ("--inputs 8x0", "--inputs 8x0: expected whole numbers"),
        ("--inputs 1x2x3", "--inputs 1x2x3: expected whole numbers"),
        ("--seconds 0", "0.0 seconds cannot be spent on measuring"),
        ("--plot p.jpg", "expected a name that ends in .png or .svg"),
        ("--plot nowhere/p.png", "cannot be written"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_measured(artifact: str, options: str, says: str) -> None:
    result = CliRunner().invoke(app, ["bench", artifact, *options.split()])

    assert result.exit_code == 2
    assert says in result.stderr
    assert 1 == len(result.stderr.strip().splitlines())


def test_an_artifact_without_the_kernel_backend_names_what_to_add(artifact: str, tmp_path: Path) -> None:
    opened = sparsec.Artifact.open(artifact)
    entry = opened.manifest["backends"]["kernel"]
    other = sparsec.Artifact(opened.root, {**opened.manifest, "backends": {"onnx": entry}})

    with pytest.raises(sparsec.SparsecError, match=r"holds onnx, not kernel; compile it with --backend kernel"):
        sparsec.bench(other, ("dense",))
