"""Commands that look: what is in files, and whether it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsec.cli.terminal import Json, Threads, folder_bytes, print_json, progress, reporting, set_threads, starting


def verify(
    path: Annotated[Path, typer.Argument(help="Artifact, program, model folder, .safetensors or .onnx file")],
    pattern: Annotated[str | None, typer.Option(help="The pattern that every sparse weight must satisfy.")] = None,
    device: Annotated[
        str,
        typer.Option(help="Compile its kernels for a GPU too, which need not be here: h200, sm_80; or cuda."),
    ] = "",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove that files are what they claim to be; exit 0 only if everything holds."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import inspection, show

        set_threads(threads)
        with progress(as_json) as say:
            results = inspection.verify(path, pattern, device, say)
        if as_json:
            print_json({"path": str(path), "ok": all(r.ok for r in results), "checks": [vars(r) for r in results]})
        else:
            show.checks(results)
        if not all(result.ok for result in results):
            raise typer.Exit(1)


def inspect(
    path: Annotated[Path, typer.Argument(help="Artifact, program, model folder, .safetensors or .onnx file")],
    as_json: Json = False,
) -> None:
    """Show sites, patterns, sparsity and sizes of anything that holds weights."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import inspection, show

            kind, found = inspection.inspect(path)
        if as_json:
            later = {"findings": inspection.findings(path, found)} if kind == "artifact" else {}
            return print_json({"path": str(path), "kind": kind, **inspection.to_json(kind, found), **later})
        if kind == "artifact":
            show.manifest(found, folder_bytes(path))
            for line in inspection.findings(path, found):
                show.out.print(line, markup=False, soft_wrap=True)
        elif kind == "program":
            show.out.print(found.dump(), markup=False, soft_wrap=True, end="")
        elif kind == "onnx":
            show.found(*found)
        else:
            show.found(found)


def report(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="File to write; default: report.html in the artifact.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    before: Annotated[
        bool, typer.Option("--before", help="Load the model that was compiled, to draw its weights too.")
    ] = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="With --before: read a .pt2 file, which can run code.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make one HTML page about an artifact: figures, every site, pictures of weights. It needs no network."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec.report.page import write
        with progress(as_json) as say:
            written = write(artifact, out, force, before, trust, say)
        if as_json:
            return print_json({"path": str(artifact), "out": str(written), "nbytes": written.stat().st_size})
        typer.echo(f"Wrote {written}")
