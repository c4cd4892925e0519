"""Checkpoints of one training pass on disk, so that it can be interrupted and gone on with.

`step-N/` holds `state.safetensors` and `state.json`, which names the SHA-256 of both. It is written beside its place
and renamed, and then the one before is removed: what has the name is whole, or was damaged later, which is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from sparsec import store
from sparsec.errors import ArtifactError, TrainingError
from sparsec.training.engine import State

TENSORS, PLAIN = "state.safetensors", "state.json"
_PREFIX, _PART = "step-", ".part"
_SHARE = 50  # a checkpoint is due after so many times what the last one took: 2 % of the time


class TerminatedError(TrainingError):
    """The process was told to end."""

    exit_code = 128 + signal.SIGTERM


class Checkpoints:
    """The last checkpoint in a folder of its own."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._saved, self._cost = time.monotonic(), 0.0

    def due(self, epoch_ended: bool) -> bool:
        """Whether it is time: after an epoch, and every `seconds`, but never for more than 2 % of the time."""
        passed = time.monotonic() - self._saved
        return passed >= self._cost * _SHARE and (epoch_ended or passed >= self.seconds)

    def save(self, state: State, step: int) -> None:
        """Write a checkpoint; it is complete when this returns. Raises ArtifactError where it cannot be written.

        A state with numbers that are not finite is not written: what follows from it is no better, and the one before
        stays.
        """
        start, place = time.monotonic(), self.folder / f"{_PREFIX}{step}"
        part = place.with_name(place.name + _PART)
        tensors, plain = state
        if not all(map(_finite, tensors.values())):
            return
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            store.save_tensors(part / TENSORS, dict(tensors))
            text = json.dumps(plain)
            words = {"tensors": store.sha256(part / TENSORS), "plain": _hash(text), "state": text}
            (part / PLAIN).write_text(json.dumps(words))
            for path in (part / TENSORS, part / PLAIN):
                _to_disk(path)
            part.rename(place)
        except (OSError, SafetensorError) as error:  # safetensors' writer reports a full disk as its own type
            reason = getattr(error, "strerror", None) or str(error)
            raise ArtifactError(f"{place} cannot be written: {reason}; free some space, then resume") from error
        for other in self.folder.iterdir():
            if other != place:
                shutil.rmtree(other, ignore_errors=True)
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def last(self) -> Path | None:
        """The folder of the last checkpoint."""
        found = [path for path in self.folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdecimal()]
        return max(found, key=lambda path: int(path.name.removeprefix(_PREFIX)), default=None)

    @property
    def step(self) -> int | None:
        """The step of the last checkpoint."""
        place = self.last()
        return int(place.name.removeprefix(_PREFIX)) if place else None

    def load(self) -> State | None:
        """The last checkpoint's state, or None. Raises ArtifactError where it is damaged."""
        place = self.last()
        if place is None:
            return None
        try:
            words: Any = json.loads((place / PLAIN).read_text())
            hashes, text = {TENSORS: words["tensors"], PLAIN: words["plain"]}, words["state"]
            found = {TENSORS: store.sha256(place / TENSORS), PLAIN: _hash(text)}
            plain: Mapping[str, Any] = json.loads(text)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(_damaged(place, f"it cannot be read ({error})")) from error
        if wrong := [name for name in hashes if hashes[name] != found[name]]:
            raise ArtifactError(_damaged(place, f"{wrong[0]} was changed after it was written (SHA-256 differs)"))
        return store.load_tensors(place / TENSORS), dict(plain)


@dataclass
class Stop:
    """Whether somebody asked this process to stop."""

    signal: int = 0
    """SIGINT or SIGTERM, or 0."""


@contextlib.contextmanager
def stopping(active: bool = True) -> Iterator[Stop]:
    """Inside, the first Ctrl-C and SIGTERM only say so in what is yielded; a second Ctrl-C interrupts at once.

    Not `active`, or in threads other than the main one, where Python has no signals, nothing changes.
    """
    stop = Stop()

    def caught(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.signal:
            raise KeyboardInterrupt
        stop.signal = number

    if not active or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(number: int, place: Path, step: int, steps: int) -> None:
    """Raise what a stopped training ends with: KeyboardInterrupt after Ctrl-C, else TerminatedErrorError."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise TerminatedError(f"the process was told to end after step {step} of {steps}; its state is kept in {place}")


def _finite(value: Tensor) -> bool:
    """Whether all numbers are; the extremes of a tensor with a NaN are NaN."""
    if not value.is_floating_point() or not value.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in value.aminmax())


def _damaged(place: Path, what: str) -> str:
    return f"{place} is damaged: {what}; delete {place.parent} and resume again: this pass then starts anew"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _to_disk(path: Path) -> None:
    """Have the system write a file out: a rename must not be on disk before what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
