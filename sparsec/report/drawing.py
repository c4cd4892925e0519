"""SVG that takes its colours from the page, so that one drawing fits a light and a dark ground. Needs matplotlib."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sparsec.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that stand for variables of the page's style sheet: written into the SVG, then replaced.
INK, FAINT, GRID = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = ("#0a0b04", "#0a0b05", "#0a0b06", "#0a0b07")
ON_FILL = "#0a0b08"
_VARIABLES = {INK: "ink", FAINT: "faint", GRID: "line", ON_FILL: "on-fill"}
_VARIABLES |= {colour: f"series-{place}" for place, colour in enumerate(SERIES, 1)}


class Drawing(NamedTuple):
    """An inline SVG, and what it shows in words, for those who do not see it."""

    svg: str
    title: str
    words: str
    said: str
    """Its figures, which are not shown beside it."""


def check_available() -> None:
    """Raise UsageError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("report needs matplotlib to draw; install it with: pip install 'sparsec[plot]'")


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Draw in the page's style; figures made inside keep it only if they are saved inside."""
    import matplotlib

    style = matplotlib.rc_context({
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "sparsec",  # equal figures give equal files
        "text.parse_math": False,  # a dollar in a name is a dollar
        "font.size": 10, "text.color": INK, "axes.labelcolor": FAINT, "axes.edgecolor": GRID, "axes.linewidth": 1,
        "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": FAINT, "ytick.labelcolor": FAINT,
        "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.labelsize": 9, "axes.titlesize": 10.5,
        "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlecolor": INK, "axes.titlepad": 10,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": GRID, "axes.axisbelow": True,
        "legend.frameon": False, "legend.fontsize": 9, "legend.labelcolor": FAINT,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    })  # fmt: skip
    with style:
        yield


def new(width: float, height: float) -> Figure:
    """A figure of so many inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.06))


def bare(panel: Axes, grid: str) -> None:
    """Leave only the lines that help to read: a grid along one axis."""
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.grid(axis=grid)  # type: ignore[arg-type]


def finished(figure: Figure, title: str, words: str, said: str = "") -> Drawing:
    """The figure as SVG for inside a page: no prolog, no metadata, ids of its own, the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    prefix = f"d{hashlib.sha256((title + text).encode()).hexdigest()[:10]}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}", text)
    for colour, name in _VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Drawing(text.replace("<svg ", '<svg role="img" aria-hidden="true" ', 1), title, words, said)
