"""The target table and the table of all runs, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from oneshot.cases import Case, Outcome, Size
from oneshot.gates import UNITS, Row


def report(rows: Sequence[Row], found: Mapping[Case, Outcome], heading: str) -> str:
    """Both tables, the reasons of what was skipped or failed, and a summary."""
    counts = {met: [_name(row) for row in rows if row.met is met] for met in (True, False, None)}
    reasons = dict.fromkeys(f"- {row.gate.name}: {row.reason}" for row in rows if row.reason)
    reasons |= dict.fromkeys(f"- {case}: {outcome.failure}" for case, outcome in found.items() if outcome.failure)
    parts = [heading, _targets(rows), _runs(found), *(["\n".join(reasons)] if reasons else [])]
    parts.append(
        f"gates met: {len(counts[True])} of {len(rows)}; missed: {'; '.join(counts[False]) or 'none'}; "
        f"skipped: {'; '.join(counts[None]) or 'none'}"
    )
    return "\n\n".join(parts)


def _name(row: Row) -> str:
    return f"{row.gate.name} ({row.gate.metric}) {row.gate.pattern} {row.gate.model} {_size(row.size)}"


def _targets(rows: Sequence[Row]) -> str:
    head = "| target | model | calibration | sparsec | peer | measured | gate | stretch | met |"
    return "\n".join([head, _rule(head), *map(_target, rows)])


def _target(row: Row) -> str:
    gate, unit = row.gate, UNITS[row.gate.metric]
    ratio = gate.metric != "violated"
    cells = [
        f"{gate.name}, {gate.pattern}: {unit}",
        gate.model,
        _size(row.size),
        _number(row.ours),
        f"{gate.peer} {_number(row.theirs)}" if gate.peer else "",
        _number(row.measured) + ("x" if ratio and row.measured is not None else ""),
        f"<= {gate.bound:g}{'x' if ratio else ''}",
        "" if gate.stretch is None else f"{gate.stretch:g}x {_word(row.stretched)}",
        _word(row.met),
    ]
    return "| " + " | ".join(cells) + " |"


def _word(met: bool | None) -> str:
    return {True: "yes", False: "**no**", None: "skipped"}[met]


def _runs(found: Mapping[Case, Outcome]) -> str:
    head = (
        "| run | CPU s | x forward | error | peak MB | anonymous MB | layers violated | zeros | trace s | "
        "time with trace |"
    )
    return "\n".join([head, _rule(head), *(_run(case, one) for case, one in found.items() if one.runs)])


def _run(case: Case, outcome: Outcome) -> str:
    run, seen = outcome.fastest, outcome.evaluation
    assert seen is not None
    beside = sum(run.beside.values())
    cells = [
        str(case),
        f"{run.seconds:.2f} of {len(outcome.runs)}",
        f"{run.seconds / run.forward:.2f}",
        f"{seen.error:.4f}",
        f"{outcome.peak / 1e6:.0f}",
        f"{min(one.peak_anonymous for one in outcome.runs) / 1e6:.0f}",
        f"{seen.violated} of {seen.layers}",
        f"{100 * seen.zeros:.1f} %",
        f"{beside:.2f}" if beside else "",
        f"{run.seconds + beside:.2f}" if beside else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _rule(head: str) -> str:
    return "|---" * (head.count("|") - 1) + "|"


def as_data(rows: Sequence[Row], found: Mapping[Case, Outcome]) -> dict[str, Any]:
    """Plain data for --json; the series of memory stay out."""
    return {
        "gates": [
            {**asdict(row.gate), "size": _size(row.size), "ours": row.ours, "theirs": row.theirs}
            | {"measured": row.measured, "met": row.met, "reason": row.reason}
            for row in rows
        ],
        "runs": {
            str(case): {
                "failure": outcome.failure,
                "evaluation": asdict(outcome.evaluation) if outcome.evaluation else None,
                "runs": [{k: v for k, v in asdict(run).items() if k != "series"} for run in outcome.runs],
            }
            for case, outcome in found.items()
        },
    }
