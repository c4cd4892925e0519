"""`sparsec opt`: passes on a program, and its text IR."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.terminal import (
    Calib,
    CalibrationSamples,
    Json,
    MaxLength,
    TextColumns,
    Threads,
    print_json,
    reporting,
    set_threads,
    starting,
)


class Check(enum.Enum):
    """How much is proven after each pass: the structure, or that the outputs are what the pass declares too."""

    structure = "structure"
    outputs = "outputs"


def opt(
    program: Annotated[Path, typer.Argument(help="Program folder, as Program.save wrote it; or any MODEL of compile")],
    passes: Annotated[str, typer.Option(help="Pass text: 'mask{pattern=2:4} | freeze'")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder to save the changed program in.")] = None,
    dump_before: Annotated[
        list[str] | None, typer.Option(help="Print the text IR before this pass. Repeatable.")
    ] = None,
    dump_after: Annotated[list[str] | None, typer.Option(help="Print the text IR after this pass. Repeatable.")] = None,
    dump_after_each: Annotated[bool, typer.Option("--dump-after-each", help="Print it after each pass.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what changed; with --dump-after-each, by pass.")] = False,
    hashes: Annotated[
        bool, typer.Option(help="Show a short content hash of each tensor, which reads them all.")
    ] = True,
    check: Annotated[Check, typer.Option(help="What is proven after each pass.")] = Check.outputs,
    calib: Calib = None,
    num_calibration_samples: CalibrationSamples = None,
    max_seq_length: MaxLength = None,
    text_columns: TextColumns = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if sparsec wrote it.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a .pt2 file, which can run code.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run passes on a program and print its text IR; the seconds of each pass go to stderr."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import opt as job
            from sparsec import registry, show
            from sparsec.data import LENGTH, SAMPLES, Request
            from sparsec.pipeline import Context
            from sparsec.store import check_writable

        if out:
            check_writable(out, force)
        set_threads(threads)
        said: list[dict[str, str]] = []
        say = (lambda title, text: said.append({"title": title, "text": text})) if as_json else show.text
        wanted = job.Dumps(tuple(dump_before or ()), tuple(dump_after or ()), dump_after_each, diff, hashes)
        columns = tuple(text_columns.split(",")) if text_columns else ()
        samples = SAMPLES if num_calibration_samples is None else num_calibration_samples
        length = LENGTH if max_seq_length is None else max_seq_length
        data = Request(calib or "", samples, length, columns, seed)
        ctx = Context(seed, resources={"backend": registry.backend("kernel")})  # for passes that ask what layers cost
        result, reports = job.run_passes(str(program), passes, ctx, wanted, check.value, trust, say, data)
        if out:
            result.save(out, force)
        if not as_json:
            return show.reports(reports)
        about = {"program": str(program), "out": out and str(out), "facts": sorted(result.facts)}
        dumps = said if dump_before or dump_after or dump_after_each or diff else []
        print_json({**about, "passes": job.as_data(reports), "dumps": dumps})
