"""The folder that programs and artifacts share: written whole or not at all, and checked before anything in it is used.

`manifest.json` lists every file with its size and SHA-256; `manifest.sha256` holds the manifest's own. Hashes show
damage, not malice. No pickle: JSON and safetensors only. A folder is built beside its final place and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import ArtifactError, UsageError
from sparsec.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, MANIFEST_HASH = "manifest.json", "manifest.sha256"
GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
GENERATED = ("README.md", "report.html")  # for people; not hashed
VERSION = 1


@contextlib.contextmanager
def writing(out: Path, force: bool) -> Iterator[Path]:
    """A new folder that becomes `out` when the block ends well, and vanishes when it does not.

    Refuses an existing `out` unless `force`, and then replaces only a folder that sparsec wrote.
    """
    from safetensors import SafetensorError

    check_writable(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}; choose another -o") from error
    try:
        folder.chmod(0o755)  # mkdtemp is private; an artifact is made to be shared
        yield folder
        _put_in_place(folder, out)
    except (OSError, SafetensorError) as error:  # safetensors' writer reports a full disk as its own type
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(
            f"{out} could not be written: {reason}; nothing was left behind. Free some space"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, out: Path) -> None:
    """Rename, keeping what was there until the new one stands."""
    old = folder.with_name(folder.name + ".old")
    if out.exists():
        out.rename(old)
    try:
        folder.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_writable(out: Path, force: bool) -> None:
    """Raise UsageError when `out` may not be written: before hours of work, not after."""
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; choose another -o, or add --force to replace it")
    if out.exists() and not (out / MANIFEST).is_file():
        raise UsageError(
            f"{out} exists and was not written by sparsec, so --force does not replace it; choose another -o"
        )
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK) or not parent.is_dir():
        raise UsageError(f"{out} cannot be written: {parent} is not a folder you may write to; choose another -o")


def check_file(path: Path, option: str) -> None:
    """Raise UsageError when a file that `option` names could not be written."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"{option} {path}: cannot be written; expected a file in a folder that is there and writable")


def seal(folder: Path, kind: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder whose files are complete; returns it with versions and hashes."""
    import torch

    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files private
    files = {
        str(path.relative_to(folder)): {"nbytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*GENERATED, MANIFEST, MANIFEST_HASH)
    }
    head = {"format": kind, "version": VERSION, "sparsec": __version__, "torch": torch.__version__}
    manifest = {**head, **manifest, "files": files}
    try:
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise ArtifactError(f"the manifest holds a number that JSON has no word for: {error}") from error
    (folder / MANIFEST).write_text(text)
    (folder / MANIFEST_HASH).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n")
    return manifest


def read(folder: Path, kind: str) -> dict[str, Any]:
    """The manifest of a folder, after every file it lists was found whole. Raises ArtifactError naming the file."""
    manifest = read_manifest(folder)
    if manifest.get("format") != kind:
        raise ArtifactError(f"{folder} is a {manifest.get('format')!r}, expected a {kind!r}")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{folder} has format version {manifest.get('version')!r}; this sparsec reads version {VERSION}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or (GRAPH in files and WEIGHTS not in files):
        raise ArtifactError(f"{folder}/{MANIFEST}: the list of files is damaged")
    for name, entry in files.items():
        try:
            _check_file(folder, name, entry)
        except (OSError, ValueError) as error:  # names no file system takes
            raise ArtifactError(f"{folder}/{MANIFEST} lists {name!r}, which cannot be read: {error}") from error
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, checked against manifest.sha256 only."""
    try:
        text, expected = (folder / MANIFEST).read_bytes(), (folder / MANIFEST_HASH).read_text().strip()
        if hashlib.sha256(text).hexdigest() != expected:
            raise ArtifactError(
                f"{folder}: {MANIFEST} and {MANIFEST_HASH} do not belong together: one of them was changed"
            )
        manifest = json.loads(text)
    except OSError as error:
        missing = Path(str(error.filename)).name
        raise ArtifactError(f"{folder} is not a sparsec folder: {missing}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder}: {MANIFEST} or {MANIFEST_HASH} is damaged: {error}") from error
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{folder}: {MANIFEST} does not hold an object")
    return manifest


def _check_file(folder: Path, name: str, entry: Any) -> None:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink() or not _inside(path, folder):
        raise ArtifactError(f"{folder}/{MANIFEST} lists {name!r}, which points outside the folder")
    if not path.is_file():
        raise ArtifactError(f"{folder}: {name} is missing")
    if not isinstance(entry, dict) or path.stat().st_size != entry.get("nbytes"):
        raise ArtifactError(f"{folder}: {name} has {path.stat().st_size} bytes, which is not what {MANIFEST} says")
    if sha256(path) != entry.get("sha256"):
        raise ArtifactError(f"{folder}: {name} was changed after it was written (SHA-256 differs)")


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that others see all of it or the one before. Raises ArtifactError where it cannot be written."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ArtifactError(f"{path} cannot be written: {error.strerror}") from error


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors; memory shared between two names is written twice, as safetensors asks."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        contiguous = tensor.detach().contiguous()
        memory = contiguous.untyped_storage().data_ptr()
        unshared[name] = contiguous.clone() if memory in seen else contiguous
        seen.add(memory)
    save_file(unshared, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises ArtifactError when it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            # Copies: a mapped file could still change after its hash was checked, and its tensors are not aligned.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def load_json(path: Path) -> Any:
    """Read a JSON file. Raises ArtifactError when it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
