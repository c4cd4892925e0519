"""The hidden folder beside an artifact where a compile keeps finished parts, so that a killed one can be resumed.

`.NAME.work/` holds `key.json`, what the work was begun for, and a folder for each pass that keeps something. It is
removed when the compile succeeds, and kept when it fails or is killed after a pass has kept something.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparsec import graph
from sparsec.errors import SparsecError, UsageError
from sparsec.migrating.folders import source_of
from sparsec.version import __version__

if TYPE_CHECKING:
    from sparsec.program import Program

KEY, LOCK = "key.json", "lock"
log = logging.getLogger("sparsec")


def folder_of(out: Path) -> Path:
    """Where the work for an artifact lies."""
    return out.absolute().with_name(f".{out.name}.work")


@contextlib.contextmanager
def working(out: Path, key: dict[str, Any], resume: bool) -> Iterator[Path]:
    """The folder of the work for `out`; `key` is all that the bits of the work depend on, as plain data.

    Without `resume` what an earlier run left is deleted. With it, work of another key is refused by a UsageError that
    says what differs, and that there is none is logged. An error that leaves work behind says so.
    """
    folder = folder_of(out)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with _locked(folder):
        _begin(folder, key, resume)
        try:
            yield folder
        except BaseException as error:
            kept = _kept(folder)
            if not kept:
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):  # the first that holds something else
                    for path in made[1:]:
                        path.rmdir()
            elif isinstance(error, SparsecError):
                error.args = (f"{error}. Finished work is kept in {folder}: --resume goes on from there",)
            else:
                log.warning("finished work is kept in %s: --resume goes on from there", folder)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def joined(out: Path, key: dict[str, Any]) -> Path:
    """The folder of the work for `out` that another process of the same compile has begun.

    Raises UsageError unless it is there and of this key: only process 0 makes it.
    """
    folder = folder_of(out)
    if not (folder / KEY).is_file():
        raise UsageError(
            f"{folder}, which process 0 has made, is not there; choose an -o on a file system that all processes see"
        )
    if found := _difference(_read(folder / KEY), json.loads(json.dumps(key))):
        raise UsageError(f"this process compiles something else than process 0: {found}; start all with one command")
    return folder


def key_of(program: Program, recipe: dict[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """All that the bits of work on a traced program depend on, for a recipe as plain data.

    `others`: what it names inside of longer texts, such as the teachers of its passes.
    """
    import numpy
    import torch

    files = files_of([recipe, source_of(program.origin.get("folder", "")), *others])
    key = {"recipe": recipe, "files": files, "threads": torch.get_num_threads()}
    key |= {"sparsec": __version__, "torch": torch.__version__, "numpy": numpy.__version__}
    key |= {"processor": torch.backends.cpu.get_cpu_capability(), "processes": _processes()}
    if not program.origin.get("folder"):
        key["weights"] = {name: graph.content_hash(value) for name, value in program.module.named_parameters()}
    return key


def _processes() -> int:
    """How many of torch.distributed work together: their sums are rounded in another order."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def files_of(data: Any) -> dict[str, list[int]]:
    """Size and time of change of every file that a text in plain data names, and of the files of folders.

    Work that was done on a file must not go on with another file of the same name.
    """
    found: dict[str, list[int]] = {}
    for text in _texts(data):
        with contextlib.suppress(OSError, ValueError):  # a text that no file system takes is no path
            path = Path(text)
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            for file in files:
                if file.is_file():
                    found[str(file.absolute())] = [file.stat().st_size, file.stat().st_mtime_ns]
    return found


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str) and data:
        yield data
    for item in data.values() if isinstance(data, dict) else data if isinstance(data, (list, tuple)) else ():
        yield from _texts(item)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold its lock, which the system gives up when this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another -o") from error
    with lock:
        if sys.platform != "win32":
            _hold(lock, folder)
        yield


def _hold(lock: IO[str], folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"another compile works in {folder}; wait for it, or choose another -o") from None


def _begin(folder: Path, key: dict[str, Any], resume: bool) -> None:
    key = json.loads(json.dumps(key))  # tuples become lists, as in the file
    if resume and _kept(folder):
        if found := _difference(_read(folder / KEY), key):
            raise UsageError(
                f"{folder} holds work of another compile, which --resume cannot go on with: {found}; repeat that "
                "compile's options, or leave out --resume, which deletes its work"
            )
        return
    if resume:
        log.warning("nothing to resume for this output; starting anew")
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / KEY).write_text(json.dumps(key, indent=1) + "\n")


def _kept(folder: Path) -> bool:
    """Whether a pass has kept something."""
    return any(path.is_file() for path in folder.rglob("*") if path.parent != folder)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); start without --resume") from error


def _difference(then: Any, now: Any, where: str = "") -> str | None:
    """The first difference of two pieces of plain data, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in {**then, **now}:
            if found := _difference(then.get(name), now.get(name), f"{where}.{name}".lstrip(".")):
                return found
        return None
    return None if then == now else f"{where} was {then if then is not None else 'not set'}, is now {now}"
