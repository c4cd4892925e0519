"""`sparsec bench`: how much faster than what you would use instead."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.terminal import Json, Threads, print_json, reporting, set_threads


def bench(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder with the kernel backend")],
    against: Annotated[str, typer.Option(help="Comma-separated: dense, onnxruntime.")] = "dense",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget per token count.")] = 3.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time an artifact's kernels, interleaved with what you would use instead."""
    with reporting(as_json):
        from sparsec import api, show
        from sparsec.artifact import Artifact

        set_threads(threads)
        rows = api.bench(Artifact.open(artifact), against.split(","), seconds)
        if as_json:
            return print_json({"path": str(artifact), "speed": rows})
        show.out.print(show.speed_table(rows, "kernel"))
