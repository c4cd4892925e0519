"""The runner: every arm of a study once, each result a line of JSON, and a table of means and standard errors.

1. An arm that has a line already, with the same passes, is not run again: a run that was killed goes on.
2. An arm is not started when the longest one so far would not fit into what is left of the budget.
3. Seconds are CPU seconds of this process; on another device they are seconds.
4. An arm that fails stops the run: no line, no gap in the table that nobody sees.
5. A study may keep its programs in the work folder. There an arm goes on from the kept one of its pattern and seed with
   whose passes its own begin, and its seconds are those of the rest. What is kept is of the CPU.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsec import Context, PassManager, Program
from sparsec.errors import UsageError

Line = dict[str, Any]


class MissingDataError(UsageError):
    """A study's data set is not on this machine, and no hub gave it: other studies can be run."""


@dataclass(frozen=True)
class Arm:
    """One training, as data."""

    arm: str
    """Its name."""
    passes: str
    """Pass text; nothing: the dense model is judged as it is."""
    pattern: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Place:
    """Where things are."""

    data: Path
    work: Path
    """For what may be made again, such as dense models."""
    device: str = "cpu"

    def seconds(self) -> float:
        """What a clock says (rule 3)."""
        return time.process_time() if self.device == "cpu" else time.perf_counter()


@dataclass(frozen=True)
class Start:
    """What all arms of a seed start from."""

    program: Program
    resources: Mapping[str, Any]
    judge: Callable[[Program], Mapping[str, float]]
    others: Mapping[str, Program] = field(default_factory=dict)
    """What the arms of these names start from instead."""


@dataclass(frozen=True)
class Study:
    """Arms, in the order they are run, and how a seed begins."""

    name: str
    arms: Sequence[Arm]
    start: Callable[[int, Place], Start]
    metrics: Sequence[str]
    """That are shown."""
    baseline: str = ""
    """The arm that others are compared with, seed by seed: the one of their pattern, or else the dense one."""
    page: str = "training.md"
    """Of docs/results, where its table belongs."""
    keep: bool = False
    """Rule 5."""
    measure: Callable[[Arm, Start, Place], Mapping[str, float]] | None = None
    """In place of passes and judge, for a study of what another one keeps."""
    plot: Callable[[Sequence[Line], Path], None] | None = None
    """Draws the results into a folder, beside the page."""
    on_cpu: str = ""
    """Why it runs on the CPU alone, where it does: `measures speed on the CPU`."""


def run_all(
    studies: Iterable[Study], out: Path, place: Place, minutes: float, say: Callable[[str], None] = print
) -> int:
    """Each of the studies as `run` does it, in one budget; one whose data are missing is skipped, with the reason."""
    begun, left = place.seconds(), 0
    for study in studies:
        try:
            left += run(study, out, place, minutes, say, begun)
        except MissingDataError as error:
            say(f"study {study.name} is skipped: {error}")
            left += len(_left(read(out), study))
    return left


def run(
    study: Study,
    out: Path,
    place: Place,
    minutes: float,
    say: Callable[[str], None] = print,
    begun: float | None = None,
) -> int:
    """Run what has no result and append it to `out`, for so many minutes. Returns how many arms are left.

    `begun`: since when the minutes count, on the clock of `place`; now, if it is not given.
    """
    on_cpu = study.on_cpu or ("keeps programs, and they are loaded to the CPU" if study.keep else "")
    if on_cpu and place.device != "cpu":
        raise UsageError(f"study {study.name} {on_cpu}: leave out --device")
    begun, lines = place.seconds() if begun is None else begun, read(out)
    left = _left(lines, study)
    start: tuple[int, Start] | None = None
    while left:
        arm, since = left[0], place.seconds()
        longest = max((line["seconds"] for line in lines if line["study"] == study.name), default=0.0)
        if since - begun + longest >= minutes * 60:  # rule 2
            say(f"the budget of {minutes:g} minutes ends; {len(left)} of {len(study.arms)} arms are left")
            break
        if start is None or start[0] != arm.seed:
            start = arm.seed, study.start(arm.seed, place)
        lines.append(_line(study, arm, start[1], place) | {"seconds": round(place.seconds() - since, 1)})
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.write(json.dumps(lines[-1]) + "\n")
        say(json.dumps({key: lines[-1][key] for key in ("arm", "pattern", "seed", "metrics", "seconds")}))
        left.pop(0)
    return len(left)


def read(out: Path) -> list[Line]:
    """The results so far."""
    return [json.loads(text) for text in out.read_text().splitlines()] if out.exists() else []


def _found(lines: Iterable[Line], study: Study, arm: Arm) -> Line | None:
    return next((line for line in lines if all(line[key] == value for key, value in _key(study, arm).items())), None)


def _left(lines: Sequence[Line], study: Study) -> list[Arm]:
    return [arm for arm in study.arms if not _found(lines, study, arm)]  # rule 1


def _key(study: Study, arm: Arm) -> Line:
    return {"study": study.name, **asdict(arm)}


def _line(study: Study, arm: Arm, start: Start, place: Place) -> Line:
    metrics, curves = (study.measure(arm, start, place), {}) if study.measure else _judged(study, arm, start, place)
    return {
        **_key(study, arm),
        "metrics": dict(metrics),
        "curves": curves,  # first and last value of each
        "commit": _commit(),
        "versions": {name: version(name) for name in ("sparsec", "torch", "transformers")},
        "threads": torch.get_num_threads(),
        "device": place.device,
    }


def _judged(study: Study, arm: Arm, start: Start, place: Place) -> tuple[Mapping[str, float], Line]:
    """An arm's metrics and curves."""
    program, passes = _beginning(study, arm, start, place)
    curves: Line = {}
    if passes:
        context = Context(seed=arm.seed, resources=dict(start.resources))
        program, reports = PassManager.parse(passes).run_reported(program, context)
        curves = {k: [v[0][1], v[-1][1]] for report in reports for k, v in report.data.get("curves", {}).items()}
        if study.keep:
            program.save(kept(study, arm, place), force=True)
    return start.judge(program), curves


def _beginning(study: Study, arm: Arm, start: Start, place: Place) -> tuple[Program, str]:
    """What an arm goes on from, and the passes that are left (rule 5)."""
    parts = [part.strip() for part in arm.passes.split("|")]
    for done in range(len(parts) if study.keep else 0, 0, -1):
        folder = kept(study, replace(arm, passes=" | ".join(parts[:done])), place)
        if folder.exists():
            program, trained = Program.load(folder), dict(start.program.module.named_parameters())
            for name, parameter in program.module.named_parameters():  # a saved program does not say which are frozen
                parameter.requires_grad_(name not in trained or trained[name].requires_grad)
            return program, " | ".join(parts[done:])
    program = start.others.get(arm.arm, start.program)
    if arm.pattern:
        program = program.replace(sites=program.sites.with_targets({"*": arm.pattern}))
    return program, arm.passes


def kept(study: Study, arm: Arm, place: Place) -> Path:
    """Where an arm's program is kept; of equal passes, pattern and seed there is one, whatever the arms are called."""
    key = json.dumps([arm.passes, arm.pattern, arm.seed])
    return place.work / study.name / hashlib.sha256(key.encode()).hexdigest()[:16]


def _commit() -> str:
    """Of the tree that this file is in; `-dirty` where tracked files differ from it."""
    where = Path(__file__).parent
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    return subprocess.run(asked, cwd=where, capture_output=True, text=True).stdout.strip() or "unknown"


def table(study: Study, lines: Sequence[Line]) -> str:
    """Means over seeds, with standard errors, and what each arm gains over the baseline of its pattern."""
    found = [line for arm in study.arms if (line := _found(lines, study, arm))]
    if not found:
        return f"None of {len(study.arms)} arms was run."
    groups: dict[tuple[str, str], dict[int, Line]] = {}
    for line in found:
        groups.setdefault((line["pattern"], line["arm"]), {})[line["seed"]] = line
    heads = [head for name in study.metrics for head in (name, *([f"minus {study.baseline}"] * bool(study.baseline)))]
    devices = sorted({line.get("device", "cpu") for line in found})
    of_cpu, where = ("CPU ", "") if devices == ["cpu"] else ("", f" on {', '.join(devices)}")
    rows = [["pattern", "arm", *heads, "n", f"{of_cpu}s"], ["---"] * (4 + len(heads))]
    for (pattern, name), own in groups.items():
        base = groups.get((pattern, study.baseline)) or groups.get(("", study.baseline), {})
        cells: list[str] = []
        for metric in study.metrics:
            cells.append(spread([line["metrics"][metric] for line in own.values()]))
            if study.baseline:
                both = [] if name == study.baseline else sorted(own.keys() & base.keys())
                gains = [own[seed]["metrics"][metric] - base[seed]["metrics"][metric] for seed in both]
                cells.append(spread(gains, sign="+") if gains else "")
        spent = statistics.mean(line["seconds"] for line in own.values())
        rows.append([pattern, name.replace("|", "\\|"), *cells, str(len(own)), f"{spent:.0f}"])
    commits = ", ".join(sorted({line["commit"] for line in found}))
    total = sum(line["seconds"] for line in found) / 60
    head = f"{len(found)} of {len(study.arms)} arms, {total:.0f} {of_cpu}minutes{where}, commit {commits}."
    texts = dict.fromkeys(f"{a.pattern:8} {a.arm:16} {a.passes}" for a in study.arms if a.passes not in ("", a.arm))
    block = ["", "```", *texts, "```"] if texts else []
    return "\n".join([head, "", *("| " + " | ".join(row) + " |" for row in rows), *block])


def spread(values: Sequence[float], sign: str = "") -> str:
    """`0.871 ± 0.004`: the mean and its standard error, which one value does not have."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def write_report(study: Study, lines: Sequence[Line], page: Path) -> None:
    """Put the table between the study's two markers in `page`. Raises UsageError when they are not there."""
    begin, end = f"<!-- study {study.name} -->", f"<!-- end of study {study.name} -->"
    text = page.read_text() if page.exists() else ""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UsageError(f"{page} has no place for the table: put the lines {begin} and {end} where it belongs")
    page.write_text(f"{before}{begin}\n\n{table(study, lines)}\n\n{end}{after}")
