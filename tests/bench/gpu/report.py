"""What was measured as JSON, as a page with tables, and as a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .goals import SPARSE, Judged, ratio

REHEARSED = "DRY RUN ON A CPU: no figure here is a measurement of anything."
_COLOURS = {"decode": "#0072B2", "prefill": "#E69F00", "encoder": "#CC79A7"}
_RATES = {
    "dense_flops": ("torch's dense product, bf16", 1e12, "Tflop/s"),
    "sparse_flops": ("mma.sp, as gathered", 1e12, "Tflop/s"),
    "mma_flops": ("mma, not sparse", 1e12, "Tflop/s"),
    "two_of_four_flops": ("torch's 2:4 product, as dense", 1e12, "Tflop/s"),
    "l2_bytes": ("L2 cache, read", 1e12, "TB/s"),
    "memory_bytes": ("memory, read", 1e12, "TB/s"),
    "launch_seconds": ("smallest kernel in a CUDA graph", 1e-6, "us"),
}


def write(result: Mapping[str, Any], judged: Sequence[Judged], folder: Path, name: str) -> list[Path]:
    """NAME.md, data/NAME.json and, where matplotlib is, NAME.svg below `folder`; their paths."""
    data, page, plot = folder / "data" / f"{name}.json", folder / f"{name}.md", folder / f"{name}.svg"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(result, indent=1) + "\n")
    drawn = importlib.util.find_spec("matplotlib") is not None
    if drawn:
        draw(result, judged, plot)
    page.write_text(text(result, judged, plot.name if drawn else ""))
    return [page, data, *([plot] if drawn else [])]


def text(result: Mapping[str, Any], judged: Sequence[Judged], plot: str) -> str:
    """The page; in a dry run without any figure that could be taken for one."""
    facts, dry = ", ".join(f"{key} {value}" for key, value in result["facts"].items()), result["rehearsed"]
    parts = [f"# Sparse linear layers on {result['facts']['gpu']}"]
    how = (
        f"`python -m tests.bench.gpu`: bf16; {facts}. Medians of 30 rounds, taken twice; dense counts with its faster "
        "median, sparse with its slower one. Calls rotate through copies of their weights (256 MB) and activations; "
        "the GPU sleeps until a round is queued. Times faster than torch's `F.linear`, geometric means over the cases."
    )
    parts.append(f"**{REHEARSED}** {facts}." if dry else how)
    parts += [_goals(judged, dry), f"![ratios]({plot})" if plot else "", _ceilings(result["ceilings"], dry)]
    parts.append(_cases("Products", result["layers"], ("regime", "rows", "cols", "tokens"), dry))
    parts.append(_cases("Encoders, under CUDA graphs", result["encoders"], ("name", "batch", "length"), dry))
    if result["left_out"]:
        parts.append("Not measured, for want of time: " + "; ".join(result["left_out"]) + ".")
    return "\n\n".join(part for part in parts if part) + "\n"


def _figure(value: float, form: str, dry: bool) -> str:
    found = format(value, form)
    return "dry run" if dry else found


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return f"## {title}\n\n" + "\n".join(lines)


def _goals(judged: Sequence[Judged], dry: bool) -> str:
    rows = []
    for one in judged:
        found = "not measured" if one.ratio is None else _figure(one.ratio, ".2f", dry)
        word = "not judged" if dry else "stretch" if one.stretched else "met" if one.met else "**missed**"
        rows.append((one.goal.regime, one.goal.pattern, str(one.goal.must), str(one.goal.stretch), found, word))
    return _table("Goals", ("", "pattern", "must", "stretch", "measured", ""), rows)


def _ceilings(found: Mapping[str, Any], dry: bool) -> str:
    rows = [(words, f"{_figure(found[key] / unit, '.3g', dry)} {name}") for key, (words, unit, name) in _RATES.items()]
    for m, rate in found["gather_bytes"].items():
        rows.append((f"shared memory, lines 4 of {m}", f"{_figure(rate / 1e12, '.3g', dry)} TB/s"))
    for kernel, share in found["reached"].items():
        rows.append((f"share of its roofline: {kernel}", _figure(share, ".2f", dry)))
    return _table("Ceilings", ("", ""), rows)


def _cases(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], dry: bool) -> str:
    """Microseconds of the slower median of each, the ratio, the model's, and the largest error."""
    if not rows:
        return ""
    names = [name for name in ("dense", *SPARSE) if any(name in row["seconds"] for row in rows)]
    cells = []
    for row in rows:
        taken = [
            _figure(max(row["seconds"][name]) * 1e6, ".1f", dry) if name in row["seconds"] else "" for name in names
        ]
        predicted = row.get("predicted", {})
        model = predicted["dense"] / min(one for name, one in predicted.items() if name != "dense") if predicted else 0
        ratios = [_figure(ratio(row), ".2f", dry), _figure(model, ".2f", dry) if predicted else ""]
        error = format(max(row["errors"].values()), ".1e")
        cells.append([*(str(row[column]) for column in columns), row["pattern"], *taken, *ratios, error])
    return _table(title, [*columns, "pattern", *(f"{name} us" for name in names), "times", "model", "error"], cells)


def draw(result: Mapping[str, Any], judged: Sequence[Judged], path: Path) -> None:
    """A bar for each goal, between what must be reached and what is aimed at."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsec", "font.size": 10}):
        figure = Figure(figsize=(9, 4), layout="constrained")
        panel = figure.subplots()
        for i, one in enumerate(judged):
            panel.bar(i, 0.0 if result["rehearsed"] else one.ratio or 0.0, color=_COLOURS[one.goal.regime], width=0.7)
            panel.vlines(i, one.goal.must, one.goal.stretch, color="#222222", linewidth=1)
            panel.plot([i, i], [one.goal.must, one.goal.stretch], "_", color="#222222", markersize=14)
        names = [f"{one.goal.regime}\n{one.goal.pattern}" for one in judged]
        panel.set_xticks(range(len(names)), names, fontsize=8)
        panel.axhline(1.0, color="#222222", linewidth=0.8, linestyle="--")
        panel.set_ylabel("times faster than F.linear")
        words = REHEARSED if result["rehearsed"] else f"{result['facts']['gpu']}, bf16; lines: must and stretch"
        panel.set_title(words, loc="left", fontsize=10)
        figure.savefig(path, metadata={"Date": None})
