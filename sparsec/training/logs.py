"""What training did, step by step, as JSON lines; in a folder also as events for TensorBoard, where that is installed.

A line is `{"pass", "step", ...}`: loss, lr, grad_norm, samples_per_second and the method's curves, or an `evaluation`.
Only samples_per_second depends on the machine: a training that was resumed writes the lines of one that was not.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import invariants, store
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from sparsec.training.loop import Loop

FILE = "training.jsonl"
log = logging.getLogger("sparsec")


class Log:
    """Lines of one pass in a file that several passes may share; those after `step`, of an earlier run, are dropped."""

    def __init__(self, path: str | Path, name: str, every: int, step: int) -> None:
        folder = Path(path).is_dir() or str(path).endswith(("/", "\\"))
        self.path, self.name, self.every = Path(path) / FILE if folder else Path(path), name, every
        self._samples, self._seconds = 0, 0.0
        try:
            if folder:
                Path(path).mkdir(parents=True, exist_ok=True)
            kept = [line for line in self._read() if line["pass"] != name or line["step"] <= step]
            store.replace_file(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        except OSError as error:
            raise UsageError(f"the log {path} cannot be written: {error.strerror}; choose another file") from error
        self._board = _board(Path(path), name, step) if folder else None

    def step(self, loop: Loop, evaluation: dict[str, float] | None = None) -> None:
        """After a step of a loop, and what was measured then."""
        since = (loop.step - 1) // self.every * self.every
        if loop.step % self.every == 0 or loop.step == loop.steps:
            losses = loop.losses[since:]
            rate = (loop.samples - self._samples) / max(loop.seconds - self._seconds, 1e-9)
            self._samples, self._seconds = loop.samples, loop.seconds
            line: dict[str, Any] = {"epoch": round(loop.step / loop.per_epoch, 3), "loss": sum(losses) / len(losses)}
            line |= {"lr": loop.rate(loop.step - 1), "grad_norm": loop.norm}
            line |= {"samples_per_second": round(rate, 3)}
            line |= {name: curve[-1][1] for name, curve in loop.engine.curves.items() if curve[-1][0] > since}
            self._write(loop.step, line)
        if evaluation:
            self._write(loop.step, {"evaluation": evaluation})

    def close(self) -> None:
        """Write out what TensorBoard has not yet."""
        if self._board is not None:
            self._board.close()

    def _write(self, step: int, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(invariants.plain({"pass": self.name, "step": step, **line})) + "\n")
        if self._board is not None:
            for name, value in {**line, **line.get("evaluation", {})}.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{self.name}/{name}", value, step)

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are there; the last may be cut off where a process was killed."""
        texts = self.path.read_text().splitlines() if self.path.exists() else []
        lines = []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
                lines.append({"pass": str(line["pass"]), "step": int(line["step"]), **line})
            except (ValueError, KeyError, TypeError) as error:
                if number == len(texts) and lines:
                    break
                raise UsageError(f"{self.path}, line {number}: not of a training log; choose another file") from error
        return lines


def _board(folder: Path, name: str, step: int) -> Any:
    """TensorBoard's writer; what an earlier run wrote after `step` is not shown."""
    make = writer()
    if make is None:
        log.warning("tensorboard is not installed, so only %s is written in %s", FILE, folder)
        return None
    return make(str(folder / name), purge_step=step + 1)


def writer() -> Any:
    """The class that writes TensorBoard's events; None where it is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter
