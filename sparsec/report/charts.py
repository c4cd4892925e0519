"""Heatmaps, histograms and curves. Each function takes figures and gives a Drawing, or None where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sparsec.report import drawing
from sparsec.report.drawing import GRID, INK, ON_FILL, SERIES, Drawing
from sparsec.report.table import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

_MOST_NUMBERS = 16  # columns of a grid up to which its numbers are written
_MOST_PANELS = 12
_SAME = 0.01  # numbers that differ by less are shown alike


class Spread(NamedTuple):
    """A sample of weights that are not zero, (count,), and the share of all weights that these are."""

    sample: Tensor
    share: float


def grid(of: Grid) -> Drawing:
    """A heatmap, from the lowest number (faint) to the highest."""
    flat = [value for row in of.values for value in row if value is not None]
    low, high = min(flat), max(flat)
    span = high - low
    numbers = len(of.layers) <= _MOST_NUMBERS
    wide = 0.46 if numbers else max(0.1, 7.0 / len(of.layers))
    longest = max(map(len, of.kinds))
    with drawing.styled():
        figure = drawing.new(0.085 * longest + 0.3 + wide * len(of.layers), 0.45 + 0.34 * len(of.kinds))
        panel = figure.subplots()
        for y, row in enumerate(of.values):
            for x, value in enumerate(row):
                if value is not None:
                    share = (value - low) / span if span > _SAME else 0.5
                    _cell(panel, x, y, 0.1 + 0.9 * share, f"{value:.2f}".lstrip("0") if numbers else "")
        panel.set_xlim(-0.5, len(of.layers) - 0.5)
        panel.set_ylim(len(of.kinds) - 0.5, -0.5)
        steps = range(0, len(of.layers), max(1, len(of.layers) // 16))
        panel.set_xticks(list(steps), [str(of.layers[i]) for i in steps])
        panel.set_yticks(range(len(of.kinds)), of.kinds)
        panel.tick_params(axis="y", labelcolor=INK)
        panel.set_xlabel("layer")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        words = f"{of.words[0].upper()}{of.words[1:]}; from {low:.3f} (faint) to {high:.3f} (full colour)."
        if span <= _SAME:
            words = f"{of.words[0].upper()}{of.words[1:]}; {low:.3f} to {high:.3f}, as good as equal."
        return drawing.finished(figure, of.title, words)


def _cell(panel: Axes, x: int, y: int, share: float, text: str) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, facecolor=SERIES[0], alpha=share, linewidth=0))
    if text:
        panel.text(x, y, text, ha="center", va="center", fontsize=8.5, color=ON_FILL if share > 0.8 else INK)


def histograms(kinds: Mapping[str, Spread], before: Mapping[str, Spread]) -> Drawing | None:
    """A panel for each kind of site: how its kept weights are spread, and, where they are known, the dense ones.

    Heights are shares of all weights, zeros too, so what was pruned is missing from the kept ones.
    """
    drawn = [name for name, one in kinds.items() if one.sample.numel()]
    names = drawn[:_MOST_PANELS]
    if not names:
        return None
    across = min(3, len(names))
    down = -(-len(names) // across)
    with drawing.styled():
        figure = drawing.new(2.95 * across, 1.75 * down + (0.25 if before else 0))
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for panel, name in zip(panels, names, strict=False):
            _histogram(panel, kinds[name], before.get(name))
            panel.set_title(name, fontsize=9.5, pad=5)
        for panel in panels[len(names) :]:
            panel.set_visible(False)
        if before:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        words = "Share of all weights of one kind of site, without the outermost 0.2 %; zeros are not drawn."
        if len(drawn) > len(names):
            words += f" The first {len(names)} of {len(drawn)} kinds."
        return drawing.finished(figure, "Weights", words)


def _histogram(panel: Axes, after: Spread, before: Spread | None) -> None:
    import numpy as np

    edge = float(np.quantile(np.abs(after.sample.numpy()), 0.998))
    bins = np.linspace(-edge, edge, 62)

    def heights(one: Spread) -> dict[str, Any]:
        count = one.sample.numel()
        return {"x": one.sample.numpy(), "bins": bins, "weights": np.full(count, one.share / max(count, 1))}

    if before is not None:
        panel.hist(**heights(before), histtype="step", color=SERIES[1], linewidth=1.3, label="before")
    panel.hist(**heights(after), color=SERIES[0], alpha=0.75, label="kept, after")
    panel.set_yticks([])
    panel.set_xlim(-edge, edge)
    panel.locator_params(axis="x", nbins=4)
    drawing.bare(panel, "x")


def curves(of: Mapping[str, Sequence[Sequence[float]]], evaluation: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """A panel for the loss, one for ADMM's residuals on a logarithmic scale, one for each other curve and figure."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, points in of.items():
        group = "residuals of ADMM (relative)" if name in ("primal", "dual") else name
        panels.setdefault(group, {})[name] = [(float(step), float(value)) for step, value in points]
    for name in dict.fromkeys(key for one in evaluation for key in one if key not in ("step", "samples")):
        group = "loss" if name == "loss" else "figures of the task"
        label = "loss on --eval" if name == "loss" else name
        panels.setdefault(group, {})[label] = [(float(one["step"]), float(one[name])) for one in evaluation]
    panels = {name: lines for name, lines in panels.items() if any(lines.values())}
    if not panels:
        return None
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    with drawing.styled():
        figure = drawing.new(3.1 * across, 2.4 * down)
        places = figure.subplots(down, across, squeeze=False).flatten()
        for place, (group, lines) in zip(places, panels.items(), strict=False):
            _lines(place, group, lines)
        for place in places[len(panels) :]:
            place.set_visible(False)
        last = [f"{name} {line[-1][1]:.4g}" for lines in panels.values() for name, line in lines.items() if line]
        return drawing.finished(figure, "Curves", f"By step; at the end {', '.join(last)}.")


def _lines(panel: Axes, group: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for place, (name, line) in enumerate(lines.items()):
        marker = "o" if len(line) <= 30 else None
        panel.plot(*zip(*line, strict=True), color=SERIES[place % 4], label=name, linewidth=1.5, marker=marker, ms=3.5)
    values = [value for line in lines.values() for _, value in line]
    if min(values) > 0 and (max(values) > 30 * min(values) or "ADMM" in group):
        panel.set_yscale("log")
        panel.minorticks_off()
        panel.yaxis.set_major_formatter("{x:g}")
    panel.set_title(group, fontsize=9.5, pad=5)
    panel.set_xlabel("step")
    panel.spines["left"].set_visible(False)
    panel.spines["bottom"].set_color(GRID)
    panel.tick_params(length=0)
    panel.grid(axis="y")
    panel.locator_params(axis="x", nbins=5)
    if len(lines) > 1:
        panel.legend(handlelength=1.2, borderpad=0.1, labelspacing=0.25)
