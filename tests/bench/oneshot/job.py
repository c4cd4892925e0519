"""What one process is asked to do and what it measured: plain data, read and written in every environment."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, "Tensor"]


@dataclass(frozen=True)
class Job:
    """One pruning run: `tool` prunes the model in `folder` by `method` to `pattern` (N is the number kept)."""

    tool: str
    method: str
    passes: str
    """The method as pass text, for sparsec."""
    folder: str
    pattern: str
    tokens: str
    """JSON file: lists of token ids, all of one length."""
    batch: int
    tokenizer: str
    """A folder with a tokenizer: llm-compressor wants one even for tokens."""
    out: str
    """Folder for run.json and weights.safetensors."""

    @staticmethod
    def read(path: str) -> Job:
        return Job(**json.loads(Path(path).read_text()))

    def write(self) -> Path:
        path = Path(self.out) / "job.json"
        path.write_text(json.dumps(asdict(self)))
        return path


@dataclass(frozen=True)
class Run:
    """What was measured in one process, after imports and loading."""

    seconds: float
    """CPU seconds of the process in the pruning call."""
    forward: float
    """CPU seconds of one pass over the calibration tokens, the fastest of three, in the same process."""
    peak: int
    """Bytes of resident memory at its highest in the call, above just before it."""
    peak_anonymous: int
    """The same without pages of mapped files."""
    max_rss: int
    """Bytes, the whole process so far."""
    before: int
    """Resident bytes just before the call."""
    series: list[tuple[float, int]] = field(repr=False)
    """(wall seconds since the call began, resident bytes above before)."""
    versions: dict[str, str]
    beside: dict[str, float]
    """What is reported and is not part of `seconds`: tracing."""

    def write(self, folder: str) -> None:
        (Path(folder) / "run.json").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> Run:
        data: dict[str, Any] = json.loads((folder / "run.json").read_text())
        return Run(**data)


class Flow(Protocol):
    """A tool at work on one job: made and loaded before anything is measured."""

    beside: dict[str, float]

    def forward(self, batch: Batch) -> None:
        """One dense forward."""

    def prune(self) -> None:
        """What is measured."""

    def tensors(self) -> dict[str, Tensor]:
        """Parameters by the model's names after pruning; tables of selections as `NAME:columns`."""
