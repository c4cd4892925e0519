"""The TensorRT backend, by a real TensorRT-RTX build."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from tensorrt_models import needs_rtx

import sparsec
from sparsec import inspection
from sparsec.backends.tensorrt import building, driver, held, session
from sparsec.backends.tensorrt.backend import ENGINE, FOLDER, LOG, MODEL, SCRIPT, TABLE
from sparsec.backends.tensorrt.driver import Settings
from sparsec.backends.tensorrt.layers import NOT_BUILT, RTX_CANNOT_SAY
from sparsec.backends.tensorrt.network import Network, targets_in
from sparsec.errors import ArtifactError, UsageError


@needs_rtx
def test_an_engine_is_built_without_a_gpu_with_its_log_table_and_script(artifact: sparsec.Artifact) -> None:
    folder, facts = artifact.root / FOLDER, artifact.manifest["backends"][FOLDER]

    assert {MODEL, ENGINE, LOG, TABLE, SCRIPT} == {path.name for path in folder.iterdir()}
    assert facts["nbytes_engine"] == (folder / ENGINE).stat().st_size > 4 * 2 * 320 * 512
    assert ("rtx", {"x": [[1, 1, 320], [2, 3, 320], [64, 64, 320]]}) == (facts["driver"], facts["shapes"])


@needs_rtx
def test_the_table_names_onnx_node_and_engine_layer_of_every_site(artifact: sparsec.Artifact) -> None:
    rows = json.loads((artifact.root / FOLDER / TABLE).read_text())

    assert ["up.weight", "down.weight"] == [row["site"] for row in rows]
    assert [(320, 512), (512, 320)] == [(row["inputs"], row["outputs"]) for row in rows]
    assert [True, True] == [row["eligible"] for row in rows]
    assert [None, None] == [row["chosen"] for row in rows]
    nodes = {node.name: node for node in onnx.load(artifact.root / FOLDER / MODEL).graph.node}
    for row in rows:
        assert ("Gemm", row["site"]) == (nodes[row["node"]].op_type, nodes[row["node"]].input[1])
        assert row["engine_layer"]


@needs_rtx
def test_what_rtx_cannot_prove_is_said_wherever_people_look(artifact: sparsec.Artifact) -> None:
    verdicts = [site["verdicts"]["tensorrt"] for site in artifact.manifest["sites"]]

    assert [(False, RTX_CANNOT_SAY)] * 2 == [(one["sparse"], one["reason"]) for one in verdicts]
    assert RTX_CANNOT_SAY == artifact.manifest["backends"][FOLDER]["note"]
    assert RTX_CANNOT_SAY in (artifact.root / "README.md").read_text()


@needs_rtx
def test_the_card_loads_it_with_trust(artifact: sparsec.Artifact) -> None:
    assert 'sparsec.load("THIS FOLDER", trust=True)' in (artifact.root / "README.md").read_text()


@needs_rtx
def test_an_engine_is_run_for_those_who_trust_its_maker_only(artifact: sparsec.Artifact) -> None:
    with pytest.raises(UsageError, match=r"would run a TensorRT engine.*trust=True"):
        sparsec.load(artifact.root)


@needs_rtx
@pytest.mark.skipif(driver.gpus() > 0, reason="there is a GPU")
def test_an_engine_needs_a_gpu(artifact: sparsec.Artifact) -> None:
    with pytest.raises(UsageError, match="runs on an NVIDIA GPU, and there is none here"):
        sparsec.load(artifact.root, trust=True)


def test_an_engine_of_another_version_is_refused_by_name() -> None:
    with pytest.raises(ArtifactError, match=r"built by rtx 1\.6\.0, and 1\.7\.1 is installed"):
        session.check_version({"driver": "rtx", "version": "1.6.0"}, "1.7.1")


@pytest.mark.parametrize(
    ("facts", "says"),
    [({"driver": "none", "note": NOT_BUILT}, "holds no engine"), ({"driver": "rtx", "strip": True}, "refit it")],
)
def test_an_engine_that_cannot_run_says_why(facts: dict[str, Any], says: str) -> None:
    if facts["driver"] == "rtx":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
        facts = {**facts, "version": driver.Driver("rtx").version}
    with pytest.raises(UsageError, match=says):
        session.open_engine(Path("x/model.engine"), {"backends": {FOLDER: facts}})


@needs_rtx
def test_an_operator_that_tensorrt_does_not_know_is_named(tmp_path: Path) -> None:
    node = helper.make_node("Mystery", ["x"], ["y"], name="riddle", domain="strange")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:]))
    model.opset_import.append(helper.make_opsetid("strange", 1))
    onnx.save(model, tmp_path / MODEL)

    with pytest.raises(ArtifactError, match="cannot read node riddle"):
        building.run(Settings("rtx"), tmp_path / MODEL, tmp_path / ENGINE, tmp_path / LOG)
    assert "[E] " in (tmp_path / LOG).read_text()
    assert not (tmp_path / ENGINE).exists()


@needs_rtx
def test_a_build_that_fails_says_tensorrts_reason(artifact: sparsec.Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no optimization profile has been defined"):
        building.run(Settings("rtx"), artifact.root / FOLDER / MODEL, tmp_path / ENGINE, tmp_path / LOG)


@needs_rtx
def test_the_log_does_not_say_where_it_was_built(artifact: sparsec.Artifact) -> None:
    log = (artifact.root / FOLDER / LOG).read_text()

    assert str(artifact.root.parent) not in log
    assert "Input filename:   model.onnx" in log


@needs_rtx
def test_the_script_is_a_shell_script_with_the_same_sizes(artifact: sparsec.Artifact) -> None:
    path = artifact.root / FOLDER / SCRIPT

    assert 0 == subprocess.run(["sh", "-n", str(path)], check=False).returncode
    for part in ("trtexec --onnx=model.onnx", "--sparsity=enable", "--minShapes=x:1x1x320", "--maxShapes=x:64x64x320"):
        assert part in path.read_text()
    assert "ORT_TENSORRT_SPARSITY_ENABLE=1" in path.read_text()


@needs_rtx
def test_nothing_is_found_out_later_without_a_proof(artifact: sparsec.Artifact) -> None:
    assert [] == inspection.findings(artifact.root, artifact.manifest)


@needs_rtx
def test_a_model_with_weights_in_a_file_beside_it_is_built(artifact: sparsec.Artifact, tmp_path: Path) -> None:
    facts, model = artifact.manifest["backends"][FOLDER], onnx.load(artifact.root / FOLDER / MODEL)
    onnx.save(model, tmp_path / MODEL, save_as_external_data=True, location="model.onnx.data")

    built = building.run(Settings("rtx", shapes=facts["shapes"]), tmp_path / MODEL, tmp_path / ENGINE, tmp_path / LOG)

    weights = Network(tmp_path / MODEL).weights(targets_in(artifact.manifest))
    assert built["nbytes_engine"] == (tmp_path / ENGINE).stat().st_size
    assert 2 == held.count(tmp_path / ENGINE, weights)


@needs_rtx
def test_all_that_running_an_engine_calls_is_there() -> None:
    """No engine runs without a GPU; that the interface has these names can be seen without one."""
    trt = driver.Driver("rtx").module()
    classes = {"runtime": trt.Runtime, "engine": trt.ICudaEngine, "context": trt.IExecutionContext}

    called = re.findall(r"self\._(runtime|engine|context)\.(\w+)\(", Path(session.__file__).read_text())

    assert 8 == len(called)
    assert [] == [name for owner, name in called if not hasattr(classes[owner], name)]


def test_findings_of_a_backend_that_is_not_installed_do_not_hide_the_artifact(tmp_path: Path) -> None:
    assert ["strange: unknown backend"] == [
        line[:24] for line in inspection.findings(tmp_path, {"backends": {"strange": {}}})
    ]
