"""A folder is there whole or not at all, and a damaged one is named before anything in it is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import random

from sparsec import store
from sparsec.errors import ArtifactError, SparsecError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "net.sparsec"
    with store.writing(out, force=False) as building:
        store.save_tensors(building / store.WEIGHTS, {"w": random(3, 4)})
        (building / store.GRAPH).write_text("{}\n")
        (building / "onnx").mkdir()
        (building / "onnx" / "model.onnx").write_bytes(bytes(range(256)))
        store.seal(building, "test", {"about": "a test"})
        (building / "README.md").write_text("for people\n")
    return out


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as somebody would who can hash."""
    manifest = json.loads((folder / store.MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / store.MANIFEST).write_text(text)
    (folder / store.MANIFEST_HASH).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")


def break_off(building: Path, error: BaseException) -> None:
    (building / "half").write_text("x")
    raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Writing --------------------------------------------------------------------------------------------------------------


def test_a_written_folder_is_read_back(folder: Path) -> None:
    manifest = store.read(folder, "test")

    assert "a test" == manifest["about"]
    assert {"graph.json", "weights.safetensors", "onnx/model.onnx"} == manifest["files"].keys()
    assert ["net.sparsec"] == names(folder.parent)


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=repr)
def test_nothing_is_left_when_writing_fails(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), store.writing(tmp_path / "out", force=False) as building:
        break_off(building, error)

    assert [] == names(tmp_path)


def test_a_full_disk_is_said_in_words_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="out could not be written: No space left on device"),
        store.writing(tmp_path / "out", force=False) as building,
    ):
        break_off(building, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    assert [] == names(tmp_path)


def test_a_disk_that_is_full_from_the_start_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store.tempfile, "mkdtemp", full)
    with pytest.raises(SparsecError, match="No space left on device"), store.writing(tmp_path / "out", force=False):
        pass

    assert [] == names(tmp_path)


def test_a_failed_replacement_leaves_the_old_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails_into_place(self: Path, target: Path) -> Path:
        if target == folder and self.suffix != ".old":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_into_place)
    with pytest.raises(ArtifactError), store.writing(folder, force=True) as building:
        (building / "new").write_text("x")

    assert ["net.sparsec"] == names(folder.parent)
    assert "a test" == store.read(folder, "test")["about"]


def test_an_existing_folder_is_replaced_only_by_force(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"exists already.*--force"), store.writing(folder, force=False):
        pass
    with store.writing(folder, force=True) as building:
        store.seal(building, "test", {"about": "new"})

    assert "new" == store.read(folder, "test")["about"]
    assert ["manifest.json", "manifest.sha256"] == names(folder)
    assert ["net.sparsec"] == names(folder.parent)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_sparsec_did_not_write_is_never_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "thesis"
    out.mkdir() if kind == "folder" else out.write_text("years of work")

    with pytest.raises(UsageError, match="was not written by sparsec"), store.writing(out, force=True):
        pass
    assert out.exists()


def test_a_parent_that_is_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match="is not a folder"):
        store.check_writable(tmp_path / "file" / "out", force=False)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    with store.writing(tmp_path / "a" / "b", force=False) as building:
        store.seal(building, "test", {})

    assert "test" == store.read(tmp_path / "a" / "b", "test")["format"]


def test_others_may_read_what_was_written(folder: Path) -> None:
    assert 0o755 == folder.stat().st_mode & 0o777


def test_number_that_json_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises((ArtifactError, ValueError)), store.writing(tmp_path / "out", force=False) as building:
        store.seal(building, "test", {"cosine": float("nan")})

    assert [] == names(tmp_path)


# Reading --------------------------------------------------------------------------------------------------------------

FILES = ["graph.json", "weights.safetensors", "onnx/model.onnx", store.MANIFEST, store.MANIFEST_HASH]


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("flip", [0x01, 0x80], ids=hex)
@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_its_file_named(folder: Path, name: str, flip: int, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= flip
    (folder / name).write_bytes(data)

    with pytest.raises(ArtifactError, match=name):
        store.read(folder, "test")


@pytest.mark.parametrize("size", [0, 1, -1])
@pytest.mark.parametrize("name", FILES[:-1])
def test_a_truncated_file_is_named(folder: Path, name: str, size: int) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:size])

    with pytest.raises(ArtifactError, match=name):
        store.read(folder, "test")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()

    with pytest.raises(ArtifactError, match=name):
        store.read(folder, "test")


def test_what_is_generated_for_people_may_change(folder: Path) -> None:
    (folder / "README.md").write_text("edited\n")

    assert "a test" == store.read(folder, "test")["about"]


def test_another_kind_of_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ArtifactError, match="is a 'test', expected a 'sparsec-program'"):
        store.read(folder, "sparsec-program")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(folder: Path, version: object) -> None:
    reseal(folder, lambda manifest: manifest.update(version=version))

    with pytest.raises(ArtifactError, match="reads version 1"):
        store.read(folder, "test")


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{", "null", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
)
def test_a_manifest_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / store.MANIFEST).write_text(text)
    digest = hashlib.sha256((folder / store.MANIFEST).read_bytes()).hexdigest()
    (folder / store.MANIFEST_HASH).write_text(digest)

    with pytest.raises(ArtifactError, match=store.MANIFEST):
        store.read(folder, "test")


@pytest.mark.parametrize("files", [None, [], "graph.json", {store.GRAPH: {}}])
def test_a_damaged_list_of_files_is_refused(folder: Path, files: object) -> None:
    reseal(folder, lambda manifest: manifest.update(files=files))

    with pytest.raises(ArtifactError):
        store.read(folder, "test")


@pytest.mark.parametrize("entry", [None, [], "x", {}, {"nbytes": 3}])
def test_a_damaged_entry_is_refused(folder: Path, entry: object) -> None:
    reseal(folder, lambda manifest: manifest["files"].update({"graph.json": entry}))

    with pytest.raises(ArtifactError, match=r"graph\.json"):
        store.read(folder, "test")


@pytest.mark.parametrize("name", ["", ".", "onnx", "a\0b", "\ud800", "a" * 5000], ids=lambda name: repr(name[:9]))
def test_a_name_that_is_no_file_is_refused(folder: Path, name: str) -> None:
    reseal(folder, lambda manifest: manifest["files"].update({name: {"nbytes": 0, "sha256": ""}}))

    with pytest.raises(ArtifactError):
        store.read(folder, "test")


@pytest.mark.parametrize("name", ["../outside", "onnx/../../outside", "{tmp}/outside", "link", "folder/outside"])
def test_a_listed_file_outside_the_folder_is_refused(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.write_text("secret")
    (folder / "link").symlink_to(outside)
    (folder / "folder").symlink_to(folder.parent)
    listed = name.replace("{tmp}", str(folder.parent))
    reseal(folder, lambda m: m["files"].update({listed: {"nbytes": 6, "sha256": store.sha256(outside)}}))

    with pytest.raises(ArtifactError, match="points outside the folder"):
        store.read(folder, "test")


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is not a sparsec folder: manifest\.json"):
        store.read(tmp_path, "test")


# Tensors and JSON -----------------------------------------------------------------------------------------------------


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    whole = random(4, 6)
    tensors = {"whole": whole, "again": whole, "rows": whole[2:], "turned": whole.t(), "empty": whole[:0]}
    store.save_tensors(tmp_path / "t.safetensors", tensors)
    found = store.load_tensors(tmp_path / "t.safetensors")

    assert tensors.keys() == found.keys()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)


def test_loaded_tensors_lie_as_if_torch_had_made_them(tmp_path: Path) -> None:
    """Kernels take other paths, and round otherwise, where a weight is not aligned."""
    store.save_tensors(tmp_path / "t.safetensors", {str(size): random(size) for size in (1, 3, 5, 7)})
    tensors = store.load_tensors(tmp_path / "t.safetensors")

    assert {0} == {tensor.data_ptr() % 64 for tensor in tensors.values()}


def test_loaded_tensors_do_not_change_with_their_file(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    store.save_tensors(path, {"w": random(64, 64)})
    tensor = store.load_tensors(path)["w"]
    with path.open("r+b") as file:
        file.seek(-64 * 64 * 4, os.SEEK_END)
        file.write(bytes(64 * 64 * 4))

    assert torch.equal(random(64, 64), tensor)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000], ids=["empty", "cut", "deep"])
def test_json_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "graph.json").write_text(text)

    with pytest.raises(ArtifactError, match=r"graph\.json"):
        store.load_json(tmp_path / "graph.json")


def test_a_damaged_tensor_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 100)

    with pytest.raises(ArtifactError, match=r"w\.safetensors"):
        store.load_tensors(tmp_path / "w.safetensors")
