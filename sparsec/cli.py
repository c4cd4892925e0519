"""The command line. Nothing heavy is imported before a command runs, so `--help` is instant.

Exit codes: 0 done, 1 the work failed or a check did not hold, 2 wrong usage.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from sparsec.errors import SparsecError

if TYPE_CHECKING:
    from sparsec.pipeline import Progress

app = typer.Typer(
    help="A compiler for sparse Transformers: smaller, faster, and proven bit for bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout instead of tables.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to compute with; default: torch's.")]
_debug = False


class Check(enum.Enum):
    """How much is proven after each pass: the structure, or that the outputs are what the pass declares too."""

    structure = "structure"
    outputs = "outputs"


@app.callback()
def _main(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    global _debug
    _debug = debug
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


@app.command()
def compile(
    model: Annotated[
        str | None, typer.Argument(help="HF folder or hub id, module:function, program, .pt2, demo:minilm")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Pattern of every eligible site, such as 64:2:5 or 2:4.")] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write; default: MODEL's name + .sparsec")
    ] = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="SELECTOR=PATTERN for some sites: 're:fc1=64:2:8'. Repeatable.")
    ] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Selector of sites that stay dense. Repeatable.")] = None,
    include_pooler: Annotated[bool, typer.Option("--include-pooler", help="Make poolers sparse too.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Recipe YAML, or the manifest.json of an artifact.")] = None,
    passes: Annotated[str | None, typer.Option(help="Pass text; default: mask | freeze.")] = None,
    score: Annotated[str | None, typer.Option(help="Importance score of the mask pass.")] = None,
    columns: Annotated[str | None, typer.Option(help="Column choice of V:N:M: l1, l2, greedy, exact.")] = None,
    backend: Annotated[str | None, typer.Option(help="Comma-separated: kernel, onnx. Default: kernel.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random; default 0.")] = None,
    threads: Threads = None,
    min_quality: Annotated[float | None, typer.Option(help="Fail below this cosine with the dense original.")] = None,
    allow_dense: Annotated[bool, typer.Option("--allow-dense", help="Accept sites without pattern.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if sparsec wrote it.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a .pt2 file, which can run code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Make a model sparse, write an artifact, prove it and measure it."""
    with _reporting(as_json):
        from sparsec import api
        from sparsec.shorthand import recipe_of

        made = recipe_of(model, pattern, layer, ignore, include_pooler, recipe, passes, score, columns, backend, seed)
        if dry_run:
            sys.stdout.write(made.model_dump_json(indent=1) + "\n" if as_json else made.to_yaml())
            return None
        _set_threads(threads)
        folder = out or Path(Path(made.model.replace(":", "-")).name + ".sparsec")
        with _progress(as_json) as progress:
            options = api.Options(force, trust, min_quality, allow_dense, progress=progress)
            artifact = api.compile_recipe(made, folder, options)
        if as_json:
            return _print_json({"path": str(folder), **artifact.manifest})
        from sparsec import show

        show.manifest(artifact.manifest, _folder_bytes(folder))
        show.out.print(f"[bold]Wrote {folder}[/]")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Artifact, program, model folder, .safetensors or .onnx file")],
    pattern: Annotated[str | None, typer.Option(help="The pattern that every sparse weight must satisfy.")] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove that files are what they claim to be; exit 0 only if everything holds."""
    with _reporting(as_json):
        from sparsec import inspection, show

        _set_threads(threads)
        results = inspection.verify(path, pattern)
        if as_json:
            _print_json({"path": str(path), "ok": all(r.ok for r in results), "checks": [vars(r) for r in results]})
        else:
            show.checks(results)
        if not all(result.ok for result in results):
            raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Artifact, program, model folder, .safetensors or .onnx file")],
    as_json: Json = False,
) -> None:
    """Show sites, patterns, sparsity and sizes of anything that holds weights."""
    with _reporting(as_json):
        from sparsec import inspection, show

        kind, found = inspection.inspect(path)
        if as_json:
            return _print_json({"path": str(path), "kind": kind, **inspection.to_json(kind, found)})
        if kind == "artifact":
            show.manifest(found, _folder_bytes(path))
        elif kind == "program":
            show.out.print(found.dump(), markup=False, soft_wrap=True, end="")
        else:
            show.found(found)


@app.command()
def bench(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder with the kernel backend")],
    against: Annotated[str, typer.Option(help="Comma-separated: dense, onnxruntime.")] = "dense",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget per token count.")] = 3.0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time an artifact's kernels, interleaved with what you would use instead."""
    with _reporting(as_json):
        from sparsec import api, show
        from sparsec.artifact import Artifact

        _set_threads(threads)
        rows = api.bench(Artifact.open(artifact), against.split(","), seconds)
        if as_json:
            return _print_json({"path": str(artifact), "speed": rows})
        show.out.print(show.speed_table(rows, "kernel"))


@app.command()
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
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if sparsec wrote it.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Read a .pt2 file, which can run code.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run passes on a program and print its text IR; the seconds of each pass go to stderr."""
    with _reporting(as_json):
        from sparsec import opt as job
        from sparsec import show
        from sparsec.pipeline import Context
        from sparsec.store import check_writable

        if out:
            check_writable(out, force)
        _set_threads(threads)
        said: list[dict[str, str]] = []
        say = (lambda title, text: said.append({"title": title, "text": text})) if as_json else show.text
        wanted = job.Dumps(tuple(dump_before or ()), tuple(dump_after or ()), dump_after_each, diff, hashes)
        result, reports = job.run_passes(str(program), passes, Context(seed), wanted, check.value, trust, say)
        if out:
            result.save(out, force)
        if not as_json:
            return show.reports(reports)
        data = {"program": str(program), "out": out and str(out), "facts": sorted(result.facts)}
        dumps = said if dump_before or dump_after or dump_after_each or diff else []
        _print_json({**data, "passes": job.as_data(reports), "dumps": dumps})


@app.command()
def passes(as_json: Json = False) -> None:
    """List the passes with their options."""
    with _reporting(as_json):
        from sparsec import catalogue, show

        found = catalogue.passes()
        if as_json:
            return _print_json({"passes": found})
        rows = [(p["name"], p["summary"] or p["status"], p["options"], p["from"]) for p in found]
        show.catalogue(rows, "pass", "what it does", "options = defaults", "from")


@app.command()
def patterns(as_json: Json = False) -> None:
    """List the patterns with what they keep."""
    with _reporting(as_json):
        from sparsec import catalogue, show

        found = catalogue.patterns()
        if as_json:
            return _print_json({"patterns": found})
        rows = [(p["text"], p["words"], p["bytes"]) for p in found]
        show.catalogue(rows, "pattern", "in words", "bytes of dense fp32")


@app.command()
def backends(as_json: Json = False) -> None:
    """List the backends, and why one is not available here."""
    with _reporting(as_json):
        from sparsec import catalogue, show

        found = catalogue.backends()
        if as_json:
            return _print_json({"backends": found})
        rows = [(b["name"], b["describes"], b["status"], b["from"]) for b in found]
        show.catalogue(rows, "backend", "what it writes", "here", "from")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
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
def _reporting(as_json: bool) -> Iterator[None]:
    """Turn sparsec's own errors into one paragraph and an exit code."""
    try:
        yield
    except SparsecError as error:
        if _debug:
            raise
        _fail(str(error), error.exit_code, as_json)
    except MemoryError:
        _fail("out of memory; nothing was written", 1, as_json)


def _fail(text: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        _print_json({"error": text, "exit_code": code})
    print(f"sparsec: {text}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """The `sparsec` command."""
    app()


if __name__ == "__main__":
    main()
