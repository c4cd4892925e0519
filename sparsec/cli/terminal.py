"""What all commands share: common options, one progress bar, JSON, and errors as one paragraph with an exit code."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sparsec.errors import SparsecError

if TYPE_CHECKING:
    from sparsec.pipeline import Progress

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; default: torch's.")]
Calib = Annotated[
    str | None,
    typer.Option(help="DATA for passes that need it: file, folder of pictures, hub data set. Default: docstrings."),
]
CalibrationSamples = Annotated[
    int | None, typer.Option("--num-calibration-samples", help="How many samples of it; default 128.")
]
MaxLength = Annotated[int | None, typer.Option("--max-seq-length", help="Most tokens of a sample; default 128.")]
TextColumns = Annotated[str | None, typer.Option(help="Column with the text, or two for pairs: question,sentence.")]
debug = False  # set by --debug


def set_threads(threads: int | None) -> None:
    """Let torch and the kernels use this many threads."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def folder_bytes(folder: Path) -> int:
    """All bytes below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """One bar on stderr with elapsed and remaining time; nothing when stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<18}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task("loading")
        yield lambda text, done, total: bar.update(task, description=text, completed=done, total=total)


@contextlib.contextmanager
def starting(quiet: bool) -> Iterator[None]:
    """The bar while a command imports what it needs: torch takes seconds, and something should be seen at once."""
    with progress(quiet or os.environ.get("RANK", "0") != "0"):
        yield


@contextlib.contextmanager
def reporting(as_json: bool) -> Iterator[None]:
    """Turn sparsec's own errors into one paragraph and an exit code."""
    try:
        yield
    except SparsecError as error:
        if debug:
            raise
        fail(str(error), error.exit_code, as_json)
    except MemoryError:
        fail("out of memory; nothing was written", 1, as_json)


def fail(text: str, code: int, as_json: bool) -> NoReturn:
    """Say what went wrong and leave with the exit code."""
    if as_json:
        print_json({"error": text, "exit_code": code})
    print(f"sparsec: {text}", file=sys.stderr)
    raise typer.Exit(code)
