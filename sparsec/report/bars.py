"""Bars: how fast, and how large. Each function takes plain figures; it gives None where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsec.benchmark import ratios, size_of
from sparsec.report import drawing
from sparsec.report.drawing import FAINT, INK, SERIES, Drawing
from sparsec.report.speeds import Layer
from sparsec.show import megabytes
from sparsec.timing import TOKENS

_BAR = 0.62  # of the room a bar has
_MOST_LAYERS = 12
_SHADES = (1.0, 0.78, 0.6, 0.44)  # of token counts, which have an order
Bars = Sequence[tuple[str, list[float | None]]]
"""Groups with their names, and a length for each bar."""


def speed(rows: Sequence[Mapping[str, Any]]) -> Drawing | None:
    """Times faster than each peer that was timed, at each size."""
    if not rows:
        return None
    names = list(dict.fromkeys(name for row in rows for name in ratios(row)))
    bars = [(size_of(row), [ratios(row).get(name) for name in names]) for row in rows]
    title = f"Whole model, measured, {_threads(rows)}: times faster than {names[0] if len(names) == 1 else '...'}"
    return _bars(title, "Measured when it was compiled, on that machine.", bars, names)


def layer_speed(layers: Sequence[Layer]) -> Drawing | None:
    """Times faster than its dense product that each kind of layer is predicted to be."""
    if not layers:
        return None
    bars: list[tuple[str, list[float | None]]] = [
        (f"{one.rows} x {one.cols}\n{one.pattern}, {one.sites} site{'s' if one.sites > 1 else ''}", list(one.speeds))
        for one in layers[:_MOST_LAYERS]
    ]
    measured = all(one.basis == "measured" for one in layers)
    source = "from kernels measured on" if measured else "by a formula; nothing was measured on"
    words = f"Predicted {source} the machine that made this page."
    if len(layers) > _MOST_LAYERS:
        words += f" The first {_MOST_LAYERS} of {len(layers)} kinds of layer."
    names = [f"{tokens} token{'s' if tokens > 1 else ''}" for tokens in TOKENS]
    return _bars("Single products, predicted: times faster than dense", words, bars, names, _SHADES)


def _bars(title: str, words: str, bars: Bars, names: Sequence[str], shades: Sequence[float] = ()) -> Drawing:
    """Horizontal bars, a group for each entry, and a line at 1. `shades`: of one colour, where names have an order."""
    each = _BAR if len(names) == 1 else 0.84 / len(names)
    height = len(bars) * (0.46 if len(names) == 1 else 0.2 * len(names) + 0.14)
    with drawing.styled():
        figure = drawing.new(7.2, 0.75 + height + (0.3 if len(names) > 1 else 0))
        panel = figure.subplots()
        for place, name in enumerate(names):
            at = [row + (place - (len(names) - 1) / 2) * each for row in range(len(bars))]
            lengths = [values[place] or 0.0 for _, values in bars]
            colour, alpha = (SERIES[0], shades[place]) if shades else (SERIES[place % len(SERIES)], 1.0)
            drawn = panel.barh(at, lengths, each * 0.86, color=colour, alpha=alpha, label=name)
            panel.bar_label(drawn, [f"{one:.2f}x" if one else "" for one in lengths], padding=4, fontsize=9, color=INK)
        panel.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1.5)
        panel.set_yticks(range(len(bars)), [text for text, _ in bars])
        panel.tick_params(axis="y", labelcolor=INK)
        panel.invert_yaxis()
        panel.set_xlim(0, max((value or 0.0 for _, values in bars for value in values), default=1.0) * 1.12)
        drawing.bare(panel, "x")
        if len(names) > 1:
            panel.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=len(names), handlelength=1, borderpad=0.2)
        each_group = (f"{group} {_said(values, names)}" for group, values in bars)
        return drawing.finished(figure, title, words, "; ".join(each_group).replace("\n", " "))


def _said(values: Sequence[float | None], names: Sequence[str]) -> str:
    pairs = [(name, one) for name, one in zip(names, values, strict=True) if one]
    return ", ".join(f"{one:.2f}x" if len(names) == 1 else f"{name} {one:.2f}x" for name, one in pairs)


def _threads(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = sorted({row["threads"] for row in rows})
    return f"{', '.join(map(str, counts))} thread{'s' if counts != [1] else ''}"


def sizes(entries: Sequence[tuple[str, int, int]]) -> Drawing:
    """Bars of bytes: (name, of sparse weights, of all else)."""
    with drawing.styled():
        figure = drawing.new(7.2, 0.85 + 0.46 * len(entries))
        panel = figure.subplots()
        ours, others = [one[1] / 1e6 for one in entries], [one[2] / 1e6 for one in entries]
        panel.barh(range(len(entries)), ours, _BAR, color=SERIES[0], label="weights of the sparse sites")
        rest = panel.barh(range(len(entries)), others, _BAR, ours, color=FAINT, alpha=0.45, label="all else")
        panel.bar_label(rest, [megabytes(a + b) for _, a, b in entries], padding=4, fontsize=9, color=INK)
        panel.set_yticks(range(len(entries)), [one[0] for one in entries])
        panel.tick_params(axis="y", labelcolor=INK)
        panel.invert_yaxis()
        panel.set_xlim(0, max(a + b for a, b in zip(ours, others, strict=True)) * 1.14)
        panel.set_xlabel("MB")
        drawing.bare(panel, "x")
        panel.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=2, handlelength=1, borderpad=0.2)
        said = ", ".join(f"{name} {megabytes(a + b)}" for name, a, b in entries)
        return drawing.finished(figure, "Bytes", "", said)
