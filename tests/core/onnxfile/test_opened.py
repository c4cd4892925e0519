"""A file that cannot be read, or not wholly, is refused in one paragraph that says what was found and expected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_files import a_file, array, node, two_layers, weight

from sparsec.errors import ArtifactError, UsageError
from sparsec.onnxfile.opened import OnnxFile
from sparsec.onnxfile.weights import survey


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.onnx does not exist"):
        OnnxFile(tmp_path / "nothing.onnx")


@pytest.mark.parametrize("content", [b"", b"\xff" * 50, b"# a text file\n"])
def test_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)

    with pytest.raises(ArtifactError, match="cannot be read as ONNX"):
        OnnxFile(tmp_path / "m.onnx")


@pytest.mark.parametrize("version", [3, 999])
def test_an_unknown_opset(tmp_path: Path, version: int) -> None:
    two_layers(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.opset_import[0].version = version
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(
        ArtifactError, match=f"asks for opset {version}, expected 7 to {onnx.defs.onnx_opset_version()}"
    ):
        OnnxFile(tmp_path / "m.onnx")


def test_an_ir_version_of_the_future(tmp_path: Path) -> None:
    two_layers(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.ir_version = 99
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ArtifactError, match=f"IR version 99, expected at most {onnx.IR_VERSION}"):
        OnnxFile(tmp_path / "m.onnx")


def test_an_unknown_domain(tmp_path: Path) -> None:
    call = node("Attend", ["x", "w"], ["y"], domain="acme")
    a_file(tmp_path / "m.onnx", [call], {"w": weight(6, 8)}, domains=["acme"])

    with pytest.raises(ArtifactError, match=r"holds the operator acme::Attend, .* expected operators of ai\.onnx"):
        OnnxFile(tmp_path / "m.onnx")


def set_location(folder: Path, text: str) -> None:
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = text
    (folder / "m.onnx").write_bytes(model.SerializeToString())


def outside(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(1000))
    set_location(folder, "../secret")


def absolute(folder: Path) -> None:
    set_location(folder, str(folder / "m.onnx_data"))


def link(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(1000))
    os.remove(folder / "m.onnx_data")
    (folder / "m.onnx_data").symlink_to(folder.parent / "secret")


def missing(folder: Path) -> None:
    os.remove(folder / "m.onnx_data")


def short(folder: Path) -> None:
    os.truncate(folder / "m.onnx_data", 100)


def no_number(folder: Path) -> None:
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "offset").value = "far"
    (folder / "m.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (outside, "'../secret', which is outside the model's folder"),
        (absolute, "which is outside the model's folder"),
        (link, "put a copy there if it is a link"),
        (missing, "m.onnx_data is missing, which holds the data of up; put it beside the model"),
        (short, "which has 100: one of the two files was cut off"),
        (no_number, "its place in m.onnx_data is damaged"),
    ],
)
def test_external_data_that_is_not_where_it_should_be(tmp_path: Path, harm: Callable[[Path], None], said: str) -> None:
    (tmp_path / "in").mkdir()
    two_layers(tmp_path / "in" / "m.onnx", external=True)
    harm(tmp_path / "in")

    with pytest.raises(ArtifactError, match=said):
        OnnxFile(tmp_path / "in" / "m.onnx")


def test_a_tensor_of_the_wrong_size(tmp_path: Path) -> None:
    two_layers(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.initializer[0].dims[0] = 7
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())

    with pytest.raises(ArtifactError, match="up is damaged"):
        survey(OnnxFile(tmp_path / "m.onnx"))


def broken(**settings: Any) -> Any:
    return [helper.make_node("Transpose", ["w"], ["t"], **settings), helper.make_node("MatMul", ["x", "t"], ["y"])]


def test_a_graph_that_contradicts_itself(tmp_path: Path) -> None:
    path = a_file(tmp_path / "m.onnx", broken(perm=[1, 5]), {"w": weight(6, 8)})

    with pytest.raises(ArtifactError, match="its graph contradicts itself"):
        survey(OnnxFile(path))


def test_a_file_beyond_what_protobuf_reads(tmp_path: Path) -> None:
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 31)  # sparse: takes no space

    with pytest.raises(ArtifactError, match=r"2\.1 GB in one file, .* save_as_external_data=True"):
        OnnxFile(tmp_path / "m.onnx")


def test_external_data_is_mapped_not_read(tmp_path: Path) -> None:
    file = OnnxFile(two_layers(tmp_path / "m.onnx", external=True))
    found = file.array(file.main.constants["up"])

    assert isinstance(found, np.memmap)
    assert np.array_equal(array(tmp_path / "m.onnx", "up"), found)
