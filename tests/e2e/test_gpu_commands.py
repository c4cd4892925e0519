"""`sparsec explain --device h200` and `sparsec bench --calibrate` on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from sparsec import show
from sparsec.backends.kernel.cuda import calibrating
from sparsec.backends.kernel.cuda.ceilings import H200
from sparsec.cli import app

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
BENCHED = dataclasses.replace(H200, basis="measured", reached={"decode": 0.8})


def net() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A wide MLP, so that a GPU is busy with it; as MODEL `test_gpu_commands:net`."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(1024, 4096), nn.GELU(), nn.Linear(4096, 1024)).eval()
    return made, {"input": torch.randn(2, 1024)}


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(show.out, "width", 140)
    monkeypatch.setitem(sys.modules, "test_gpu_commands", sys.modules[__name__])


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert code == result.exit_code, result.output + str(result.exception)
    return result.stdout if code == 0 else " ".join(result.stderr.split())


def test_explain_tells_about_a_gpu_that_is_not_here_and_labels_every_figure() -> None:
    text = " ".join(run("explain", "test_gpu_commands:net", "--device", "h200", "--tokens", "2").split())

    assert "times faster than dense at 2 tokens (model, NVIDIA H200, in bf16)" in text
    assert "times faster than the dense graph on NVIDIA H200, in bf16 (model)" in text
    assert "model: kernels were not measured on NVIDIA H200" in text
    assert "threads" not in text and "this machine" not in text


def test_explain_as_json_has_the_devices_figures() -> None:
    arguments = ("--device", "h200", "--tokens", "2", "--pattern", "64:2:16", "--json")
    found = json.loads(run("explain", "test_gpu_commands:net", *arguments))
    (row,) = found["whole"]

    assert ("NVIDIA H200, in bf16", "model", "sm_90a") == (found["device"], found["basis"], found["kernels"])
    assert ["panels", "dense"] == [site["variants"]["64:2:16"]["kernel"] for site in found["sites"]]  # the head
    assert 2 * 4096 * 1024 * 2 / H200.memory_bytes < row["dense_seconds"] < 1e-4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("explain", "test_gpu_commands:net", "--device", "a100"), "no table of device 'a100'"),
        (("explain", "test_gpu_commands:net", "--device", "cuda"), "cuda: no CUDA GPU was found"),
        (("explain", "test_gpu_commands:net", "--device", "h200", "--measure"), "sparsec bench --calibrate"),
        (("explain", "test_gpu_commands:net", "--device", "h200", "--backend", "onnx"), "leave --device out"),
        (("bench", "--calibrate"), "cuda: no CUDA GPU was found, and only a GPU can be measured"),
        (("bench", "folder", "--calibrate"), "leave one of them out"),
        (("bench",), "found no ARTIFACT to measure"),
    ],
)
def test_what_cannot_be_is_told(arguments: tuple[str, ...], words: str) -> None:
    assert words in run(*arguments, code=2)


def test_calibrate_prints_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrating, "calibrate", lambda device, progress: BENCHED)
    text = run("bench", "--calibrate")

    for part in ("NVIDIA H200, measured", "871 Tflop/s", "4.30 TB/s", "4 of 16", "2.5 us", "roofline, decode"):
        assert part in text
    assert dataclasses.asdict(BENCHED)["l2_bytes"] == json.loads(run("bench", "--calibrate", "--json"))["l2_bytes"]
