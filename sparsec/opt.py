"""The job behind `sparsec opt`: passes on one program, with its text before, between and after them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsec import sources, store
from sparsec.data import Deferred, Request
from sparsec.errors import UsageError
from sparsec.models import load_model
from sparsec.pipeline import CheckLevel, Context, Pass, PassManager, PassReport
from sparsec.program import FACTS, FORMAT, Program

Say = Callable[[str, str], None]
"""Told a title (`after freeze`; empty for the result) and a text, as soon as it is there: a later pass may fail."""


@dataclass(frozen=True)
class Dumps:
    """Which texts are wanted. None named: the result's dump."""

    before: tuple[str, ...] = ()
    """Names of passes."""
    after: tuple[str, ...] = ()
    after_each: bool = False
    diff: bool = False
    """What changed instead of the whole text: by each pass with `after_each`, else by all of them."""
    hashes: bool = True
    """With a content hash of each tensor, so that a changed weight is seen."""

    def check(self, manager: PassManager) -> None:
        """Raise UsageError for a name that no pass has."""
        names = [one.name for one in manager.passes]
        for option, wanted in (("--dump-before", self.before), ("--dump-after", self.after)):
            for name in wanted:
                if name not in names:
                    raise UsageError(f"{option} {name}: no such pass is run; expected one of {', '.join(names)}")


def run_passes(
    spec: str,
    text: str,
    ctx: Context,
    dumps: Dumps,
    check: CheckLevel,
    trust: bool,
    say: Say,
    samples: Request | None = None,
) -> tuple[Program, tuple[PassReport, ...]]:
    """Load what `spec` names, run the passes of `text` on it, `say` the dumps. All that can be refused is, at once.

    `samples`: the calibration data of passes that ask for it; None: the default.
    """
    samples = samples or Request(seed=ctx.seed)
    sources.check(samples.source)
    manager = PassManager.parse(text)
    dumps.check(manager)
    manager.check_order(_facts(Path(spec)))
    loaded = load_model(spec, ctx.seed, trust)
    start = loaded.program
    calibration = Deferred(start, loaded.tools, samples)
    ctx = dataclasses.replace(ctx, resources={"calibration": calibration, **ctx.resources})
    writer = _Writer(dumps, say, manager)
    result, reports = manager.run_reported(start, ctx, check, writer.before, writer.after)
    writer.finish(result)
    return result, reports


def as_data(reports: tuple[PassReport, ...]) -> list[dict[str, Any]]:
    """The reports as `--json` prints them."""
    return [
        {"pass": one.text, "seconds": one.seconds, "notes": [vars(note) for note in one.notes], "data": one.data}
        for one in reports
    ]


def _facts(folder: Path) -> Iterable[str]:
    """The facts of a saved program, or of one that is yet to be traced, without loading weights."""
    if not (folder / store.MANIFEST).is_file():
        return {"traced"}
    manifest = store.read_manifest(folder)
    state = manifest.get("program") if manifest.get("format") == FORMAT else None
    facts = state.get("facts") if isinstance(state, dict) else None
    return map(str, facts) if isinstance(facts, list) else FACTS  # what is no program is load_model's to explain


class _Writer:
    """Dumps each state of the program at most once, and only when it is wanted."""

    def __init__(self, dumps: Dumps, say: Say, manager: PassManager) -> None:
        self.dumps, self.say, self.passes = dumps, say, str(manager)
        self.program: Program | None = None
        self.text = self.previous = self.first = ""

    def before(self, one: Pass, program: Program) -> None:
        if self.dumps.diff:
            self.previous = self._dump(program)
            self.first = self.first or self.previous
        if one.name in self.dumps.before:
            self.say(f"before {one}", self._dump(program))

    def after(self, one: Pass, program: Program) -> None:
        if self.dumps.diff and self.dumps.after_each:
            self.say(f"changed by {one}", self._difference(self.previous, self._dump(program), str(one)))
        if one.name in self.dumps.after or (self.dumps.after_each and not self.dumps.diff):
            self.say(f"after {one}", self._dump(program))

    def finish(self, program: Program) -> None:
        dumps = self.dumps
        if dumps.diff and not dumps.after_each:
            self.say(f"changed by {self.passes}", self._difference(self.first, self._dump(program), self.passes))
        elif not (dumps.before or dumps.after or dumps.after_each):
            self.say("", self._dump(program))

    def _dump(self, program: Program) -> str:
        if program is not self.program:
            self.program, self.text = program, program.dump(self.dumps.hashes)
        return self.text

    def _difference(self, old: str, new: str, by: str) -> str:
        titles = (f"before {by}", f"after {by}")
        lines = difflib.unified_diff(old.splitlines(), new.splitlines(), *titles, lineterm="")
        return "".join(f"{line}\n" for line in lines) or "nothing\n"
