"""What verification finds in the folder of a real TensorRT-RTX build, and what it makes of damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from models import random
from onnx import numpy_helper
from tensorrt_models import needs_judge, needs_rtx

import sparsec
from sparsec.backend import CHECK_FILE, Check, CheckData
from sparsec.backends.tensorrt import checks, held
from sparsec.backends.tensorrt.backend import ENGINE, FOLDER, LOG, MODEL, TABLE
from sparsec.backends.tensorrt.layers import NOT_BUILT, RTX_CANNOT_SAY
from sparsec.backends.tensorrt.network import Network, targets_in
from sparsec.store import load_tensors


@needs_rtx
def test_everything_is_proven_from_disk_without_running_the_engine(proven: dict[str, Check]) -> None:
    assert all(check.ok for check in proven.values()), proven
    names = ("patterns", "layers", "outputs in onnxruntime", "2:4", "layer table", "engine")
    assert {f"tensorrt: {name}" for name in names} <= set(proven)
    assert "holds 2 of 2 sparse weights bit for bit" in proven["tensorrt: engine"].detail
    assert RTX_CANNOT_SAY in proven["tensorrt: engine"].detail


@needs_rtx
@needs_judge
def test_polygraphy_is_asked_where_it_answers_in_seconds(proven: dict[str, Check]) -> None:
    assert "finds 2 weights 2:4 too" in proven["tensorrt: polygraphy"].detail


@needs_judge
@pytest.mark.parametrize(
    ("width", "dtype", "judged"),
    [
        (64, torch.bfloat16, 0),
        pytest.param(66, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(64, torch.float16, 2, marks=pytest.mark.slow),
    ],
)
def test_weights_that_polygraphy_misreads_do_not_stop_a_compile(
    tmp_path: Path, width: int, dtype: torch.dtype, judged: int
) -> None:
    layers = (
        torch.nn.Linear(width, 32),
        torch.nn.ReLU(),
        torch.nn.Linear(32, 32),
        torch.nn.Linear(32, 8),
    )  # and a head
    net = torch.nn.Sequential(*layers).to(dtype).eval()
    artifact = sparsec.compile(
        net,
        [random(2, width).to(dtype)],
        out=tmp_path / "net.sparsec",
        pattern="2:4",
        passes="mask | freeze",
        backends=["tensorrt{driver=none}"],
        options=sparsec.Options(measure_speed=False),
    )

    found = [check.detail for check in artifact.verify() if check.name == "tensorrt: polygraphy"]
    assert ([f"polygraphy inspect sparsity finds {judged} weights 2:4 too"] if judged else []) == found


@needs_rtx
def test_a_weight_that_breaks_the_pattern_is_found(copy: Path, artifact: sparsec.Artifact) -> None:
    model = onnx.load(copy / FOLDER / MODEL)
    tensor = next(entry for entry in model.graph.initializer if entry.name == "up.weight")
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + 1, "up.weight"))
    onnx.save(model, copy / FOLDER / MODEL)

    check = CheckData.from_tensors(load_tensors(copy / CHECK_FILE))
    found = {one.name: one.ok for one in checks.verify(copy / FOLDER, artifact.manifest, check)}
    assert not found["tensorrt: patterns"]
    assert "tensorrt: engine" not in found  # nothing is said of an engine of a file that does not hold


@needs_rtx
@pytest.mark.parametrize(
    ("file", "before", "after"),
    [(TABLE, "null", "true"), (TABLE, "node_Gemm", "node_MatMul"), (LOG, "[ONNX Layer: node_Gemm_2]", "")],
)
def test_a_table_that_does_not_follow_from_file_and_log_is_found(
    copy: Path, artifact: sparsec.Artifact, file: str, before: str, after: str
) -> None:
    path, manifest = copy / FOLDER / file, artifact.manifest
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))

    network = Network(copy / FOLDER / MODEL)
    found = checks.table_check(copy / FOLDER, network, targets_in(manifest), manifest["backends"][FOLDER])
    assert not found.ok
    assert "does not follow from" in found.detail


@needs_rtx
def test_a_log_that_is_no_text_is_found(copy: Path, artifact: sparsec.Artifact) -> None:
    (copy / FOLDER / LOG).write_bytes(b"\xff\xfe")

    network = Network(copy / FOLDER / MODEL)
    facts = artifact.manifest["backends"][FOLDER]
    assert not checks.table_check(copy / FOLDER, network, targets_in(artifact.manifest), facts).ok


def engine_check(folder: Path, manifest: dict[str, Any], **changes: Any) -> Check:
    facts = {**manifest["backends"][FOLDER], **changes}
    return checks.engine_check(folder / FOLDER, Network(folder / FOLDER / MODEL), targets_in(manifest), facts)


@needs_rtx
def test_an_engine_that_is_missing_or_cut_is_found(copy: Path, artifact: sparsec.Artifact) -> None:
    engine = copy / FOLDER / ENGINE
    engine.write_bytes(engine.read_bytes()[:-1])
    assert not engine_check(copy, artifact.manifest).ok

    engine.unlink()
    assert not engine_check(copy, artifact.manifest).ok


@needs_rtx
def test_an_engine_that_was_not_built_is_no_fault_and_one_too_many_is(copy: Path, artifact: sparsec.Artifact) -> None:
    assert not engine_check(copy, artifact.manifest, driver="none").ok

    (copy / FOLDER / ENGINE).unlink()
    found = engine_check(copy, artifact.manifest, driver="none", note=NOT_BUILT)
    assert (True, NOT_BUILT) == (found.ok, found.detail)


@needs_rtx
@pytest.mark.parametrize(
    ("built_by", "read_back", "ok", "says"),
    [
        ("tensorrt", False, False, "does not take it"),
        ("rtx", False, True, "does not take it"),  # it has kernels for other GPUs
        ("tensorrt", True, True, "loaded again"),
    ],
)
def test_what_a_gpu_made_of_the_engine_is_told(
    artifact: sparsec.Artifact, built_by: str, read_back: bool, ok: bool, says: str
) -> None:
    found = engine_check(artifact.root, artifact.manifest, driver=built_by, read_back=read_back)

    assert ok == found.ok
    assert says in found.detail


@needs_rtx
def test_an_engine_with_another_weight_holds_fewer(copy: Path, artifact: sparsec.Artifact) -> None:
    path = copy / FOLDER / ENGINE
    weight = next(e for e in onnx.load(copy / FOLDER / MODEL).graph.initializer if e.name == "down.weight")
    row = numpy_helper.to_array(weight)[5].tobytes()
    path.write_bytes(path.read_bytes().replace(row, row[::-1]))

    found = engine_check(copy, artifact.manifest)

    assert not found.ok
    assert "holds 1 of 2" in found.detail


def test_weights_are_found_as_they_are_and_merged_with_others(tmp_path: Path) -> None:
    one, other = random(6, 4), random(6, 4, seed=1)
    merged = torch.cat((one, other)).T.contiguous()  # as TensorRT-RTX merges q, k and v
    file = tmp_path / "engine"

    file.write_bytes(b"head" + one.numpy().tobytes() + b"tail")
    assert 1 == held.count(file, [one, other])
    file.write_bytes(b"head" + merged.numpy().tobytes() + b"tail")
    assert 2 == held.count(file, [one, other])
    file.write_bytes(b"")
    assert 0 == held.count(file, [one])
    file.write_bytes(b"nothing of the kind")
    assert 0 == held.count(file, [one, torch.zeros(6, 4)])
