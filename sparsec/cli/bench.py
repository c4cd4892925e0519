"""`sparsec bench`: how much faster than what you would use instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from sparsec.cli.terminal import Json, print_json, progress, reporting, starting
from sparsec.errors import UsageError

Item = TypeVar("Item")
_PEERS = "dense,mkldnn,onnxruntime,onnxruntime-int8"


def bench(
    artifact: Annotated[Path | None, typer.Argument(help="Artifact folder with the kernel backend")] = None,
    against: Annotated[str, typer.Option(help="What to compare with, comma-separated.")] = _PEERS,
    tokens: Annotated[str | None, typer.Option(help="Token counts; default: 1,32,128,512.")] = None,
    inputs: Annotated[str | None, typer.Option(help="Batch x length instead of --tokens: 8x128,1x16.")] = None,
    threads: Annotated[str | None, typer.Option(help="Thread counts: 1,2; default: torch's own.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each row of the table.")] = 3.0,
    layers: Annotated[bool, typer.Option("--layers", help="Time every distinct sparse layer by itself, too.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the ratios: FILE.png or FILE.svg.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure a GPU's limits instead, by which layers are chosen there.")
    ] = False,
    device: Annotated[str, typer.Option(help="The GPU to calibrate: cuda, cuda:1.")] = "cuda",
    as_json: Json = False,
) -> None:
    """Time an artifact's kernels, interleaved with what you would use instead; ratios first."""
    with reporting(as_json):
        if calibrate:
            if artifact is not None:
                raise UsageError("--calibrate measures a GPU and needs no ARTIFACT: leave one of them out")
            return _calibrate(device, as_json)
        if artifact is None:
            raise UsageError("found no ARTIFACT to measure; expected a folder such as minilm.sparsec, or --calibrate")
        with starting(as_json):
            from sparsec import benchmark, show_bench, timing
            from sparsec.artifact import Artifact
            from sparsec.plot import check_plot, save_plot

        if tokens is not None and inputs is not None:
            raise UsageError("found both --tokens and --inputs; give one of them")
        counts = _items(tokens, "--tokens", _count, "1,32,128") if tokens is not None else timing.TOKENS
        sizes = _items(inputs, "--inputs", _size, "8x128,1x16") if inputs is not None else []
        numbers = _items(threads, "--threads", _count, "1,2") if threads is not None else []
        if plot is not None:
            check_plot(plot)
        opened = Artifact.open(artifact)
        with progress(as_json) as bar:
            result = benchmark.bench(
                opened, against.split(","), tokens=counts, sizes=sizes, threads=numbers, seconds=seconds,
                layers=layers, progress=bar,
            )  # fmt: skip
        if plot is not None:
            save_plot(result, plot)
        if as_json:
            return print_json({"path": str(artifact), **result})
        show_bench.show(result)


def _calibrate(device: str, as_json: bool) -> None:
    from sparsec import registry, show_bench

    with progress(as_json) as bar:
        found = registry.backend("kernel").calibrate_device(device, bar)
    if as_json:
        return print_json(found)
    show_bench.ceilings(found)


def _items(text: str, option: str, read: Callable[[str], Item], example: str) -> list[Item]:
    """A comma-separated list; raises UsageError naming the option."""
    try:
        return [read(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text}: expected whole numbers of 1 or more, such as {example}") from None


def _count(text: str) -> int:
    if not text.isascii() or not text.strip().isdigit() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _size(text: str) -> tuple[int, int]:
    batch, by, length = text.partition("x")
    if not by:
        raise ValueError(text)
    return _count(batch), _count(length)
