"""The command line. Nothing heavy is imported before a command runs, so `--help` is instant.

One file a group of commands, one line a command below. Exit codes: 0 done, 1 the work failed or a check did not hold,
2 wrong usage.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from sparsec.cli import bench, compiling, dumps, lists, look, speed, terminal
from sparsec.version import __version__

app = typer.Typer(
    help="A compiler for sparse Transformers: smaller, faster, and proven bit for bit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    compiling.compile,
    look.verify,
    look.inspect,
    look.report,
    speed.explain,
    speed.select,
    bench.bench,
    dumps.opt,
    lists.passes,
    lists.patterns,
    lists.backends,
):
    app.command()(command)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsec {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    terminal.debug = debug
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def main() -> None:
    """The `sparsec` command."""
    app()
