"""Plots of what `bench` measured and of what `select` found; it and `report` import matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import machine, store
from sparsec.benchmark import ratios, size_of, title
from sparsec.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDINGS = (".png", ".svg")
_COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#CC79A7")  # of Okabe and Ito: told apart with any colour vision
_NAMES = {"dense": "torch", "mkldnn": "torch, prepacked (oneDNN)", "onnxruntime": "onnxruntime fp32",
          "onnxruntime-int8": "onnxruntime int8"}  # fmt: skip
_INK, _FAINT = "#222222", "#767676"
_GROUP = 0.82  # of the space between two groups, what the bars take


def check_plot(path: Path) -> None:
    """Refuse a plot that could not be saved, before anything is measured. Raises UsageError."""
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(f"--plot {path}: expected a name that ends in {' or '.join(_ENDINGS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with: pip install 'sparsec[plot]'")
    store.check_file(path, "--plot")


def save_plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw the whole model's ratios: a panel for each thread count, a group for each size, a bar for each peer."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = result["speed"]
    counts = list(dict.fromkeys(row["threads"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in ratios(row)))
    # Text stays text in SVG, and equal figures give equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsec", "font.size": 10}):
        figure = Figure(figsize=(9, 1.5 + 2.9 * len(counts)), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        panels = figure.subplots(len(counts), 1, sharey=True, squeeze=False)[:, 0]
        for panel, count in zip(panels, counts, strict=True):
            _draw(panel, [row for row in rows if row["threads"] == count], names)
        figure.suptitle(
            f"{title(result)}: times faster than the same weights run dense",
            x=0.012, ha="left", fontsize=13, fontweight="bold", color=_INK,
        )  # fmt: skip
        panels[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 1.07), ncols=len(names), frameon=False)
        facts = "\n".join(textwrap.wrap(machine.line(result["machine"], counts), 130))
        figure.supxlabel(facts, x=0.012, ha="left", fontsize=8, color=_FAINT)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def save_front(found: Mapping[str, Any], model: str, path: Path) -> None:
    """Draw what a choice of patterns loses over its budget: the points of `front`, and the choice itself."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across, key = ("speed" if "speed" in found else "density"), found["figure"]["key"]
    points = sorted((point[across], point[key]) for point in found["front"])
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsec", "font.size": 10}):
        figure = Figure(figsize=(7, 4.2), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        panel = figure.subplots()
        panel.plot(*zip(*points, strict=True), color=_COLOURS[0], marker="o", markersize=4, label="other budgets")
        panel.plot([found[across]], [found[key]], "D", color=_COLOURS[2], label="this choice")
        panel.set_xlabel(
            "times faster than dense, predicted" if across == "speed" else "share of the weights that stay"
        )
        panel.set_ylabel(found["figure"]["words"])
        panel.set_ylim(bottom=0)
        panel.set_title(model, loc="left", fontsize=12, fontweight="bold", color=_INK)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e5e5e5")
        panel.legend(frameon=False)
        figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw(panel: Axes, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    width = _GROUP / len(names)
    for i, name in enumerate(names):
        places = [group - _GROUP / 2 + (i + 0.5) * width for group in range(len(rows))]
        heights = [ratios(row).get(name, 0.0) for row in rows]
        bars = panel.bar(places, heights, width * 0.92, color=_COLOURS[i % 4], label=_NAMES.get(name, name))
        labels = [f"{height:.2f}" if height else "" for height in heights]
        size = 8 if len(names) * len(rows) <= 24 else 6
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.9}  # the line at 1 may pass behind
        panel.bar_label(bars, labels, padding=2.5, fontsize=size, color=_INK, bbox=ground)
    panel.axhline(1.0, zorder=1.5, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    panel.set_xticks(range(len(rows)), [size_of(row) for row in rows])
    panel.set_xlim(-0.5, len(rows) - 0.5)
    panel.margins(y=0.14)
    threads = rows[0]["threads"]
    panel.set_title(f"{threads} thread{'s' if threads > 1 else ''}, {rows[0]['clock']}", loc="left", fontsize=10)
    panel.set_ylabel("times faster")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#e5e5e5")
    panel.set_axisbelow(True)
