"""Weights that anybody wrote are described, and their claims are checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Residual, made, random
from torch import Tensor

from sparsec import PassManager, inspection, store, trace
from sparsec.errors import ArtifactError, UsageError
from sparsec.pattern import Pattern


def pruned(pattern: str, rows: int = 64, cols: int = 80) -> Tensor:
    parsed, weight = Pattern.parse(pattern), random(rows, cols)
    return torch.where(parsed.mask(parsed.project(weight.abs()), cols)[0], weight, 0.0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"sparse": pruned("2:4"), "dense": random(4, 8), "bias": random(8), "ids": torch.zeros(4, 4).long()}
    store.save_tensors(tmp_path / "model.safetensors", tensors)
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "2:5", "64:2:5", "64:2:8", "4:8", "1:16", "1:8", "2:16"])
def test_a_usual_pattern_is_recognised(pattern: str) -> None:
    found = inspection.look("w", pruned(pattern))

    assert pattern == str(found.pattern)
    assert found.sparse


@pytest.mark.parametrize("weight", [random(4, 8), random(4, 8).where(random(4, 8, seed=1) > -0.5, 0.0)])
def test_a_weight_that_follows_none_has_no_pattern(weight: Tensor) -> None:
    assert inspection.look("w", weight).pattern is None


def test_a_checkpoint_lists_its_matrices(checkpoint: Path) -> None:
    kind, found = inspection.inspect(checkpoint)

    assert ("weights", ["dense", "sparse"]) == (kind, sorted(one.name for one in found))
    assert {"dense": None, "sparse": "2:4"} == {
        w["name"]: w["pattern"] for w in inspection.to_json(kind, found)["weights"]
    }


def test_only_weights_that_were_made_sparse_must_hold_a_pattern(checkpoint: Path) -> None:
    assert [("sparse", True)] == [(check.name, check.ok) for check in inspection.verify(checkpoint, "2:4")]
    (failed,) = inspection.verify(checkpoint, "1:4")
    assert not failed.ok
    assert "row 0, group 0: 2 nonzero columns, at most 1 allowed" in failed.detail


def test_weights_alone_declare_no_pattern(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="--pattern"):
        inspection.verify(checkpoint, None)


def test_dense_weights_hold_no_pattern_vacuously(tmp_path: Path) -> None:
    store.save_tensors(tmp_path / "model.safetensors", {"w": random(4, 8)})

    with pytest.raises(UsageError, match="no weight has zeros"):
        inspection.verify(tmp_path, "2:4")


def test_a_frozen_program_is_proven_and_a_broken_one_is_not(tmp_path: Path) -> None:
    program = PassManager.parse("mask{pattern=2:4} | freeze").run(trace(made(Residual), (random(2, 5),)))
    checks = inspection.verify(program.save(tmp_path / "good"), None)
    broken = program.clone()
    broken.sites["up.weight"].write(broken.module, torch.ones(1, 8, 5))

    assert all(check.ok for check in checks)
    assert {"program", "up.weight", "down.weight"} == {check.name for check in checks}
    failed = [check for check in inspection.verify(broken.save(tmp_path / "bad"), None) if not check.ok]
    assert ["up.weight"] == [check.name for check in failed]
    assert failed[0].detail.startswith("8 violations: row 0, group 0: 4 nonzero columns")


@pytest.mark.parametrize("name", ["nothing", "text.txt", "empty"])
def test_what_holds_no_weights_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "empty").mkdir()

    with pytest.raises(UsageError, match="expected an artifact, a program"):
        inspection.verify(tmp_path / name, "2:4")


def test_a_damaged_onnx_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 50)

    with pytest.raises(ArtifactError, match=r"model\.onnx cannot be read as ONNX"):
        inspection.verify(tmp_path / "model.onnx", "2:4")
