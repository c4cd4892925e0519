"""The pictures of docs/concepts.md, drawn from what `sparsec.Pattern` really keeps of a small random weight.

    python docs/generate/pictures.py        # writes docs/pictures/*.svg; a test holds the files to it

Colours are middle ones, which can be read on a light page and on a dark one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsec import Pattern
from sparsec.columns import Solver
from sparsec.vnm import SharedColumns

FOLDER = Path(__file__).parents[1] / "pictures"
CELL, GAP, LINE = 22, 26, 20  # a weight, what lies between two parts of a picture, a line of text
INK, KEPT, CUT, SHARED = "#738094", "#3b7dd8", "#73809440", "#e08a2e"


def weight(rows: int, cols: int) -> Tensor:
    """The same score for every weight of that size: (rows, cols), from 0 to 1."""
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(5)) ** 2


def pictures() -> dict[str, str]:
    """SVG text by file name."""
    made = {name: _masks(text, width) for name, (text, width) in MASKS.items()}
    return made | {"block.svg": _block()}


MASKS = {"nm.svg": ("2:4", 4), "vnm.svg": ("4:2:8", 8), "strip.svg": ("4:2:8@strip", 16)}  # pattern, width of a window
SOLVERS: dict[Solver, str] = {"l1": "largest sums", "greedy": "greedy, with swaps"}


def _masks(text: str, width: int) -> str:
    """A weight of 8 x 16, what the pattern keeps of it, and the columns that rows share."""
    score, pattern = weight(8, 16), Pattern.parse(text)
    selection = pattern.project(score)
    mask = pattern.mask(selection, 16)[0]
    rows = pattern.v if isinstance(pattern, SharedColumns) else 8
    parts: list[str] = []
    for first in range(0, 8, rows):
        top = first * CELL + (first // rows) * GAP + 10
        if isinstance(pattern, SharedColumns):
            parts += [_mark(c, top) for c in pattern.absolute_columns(selection, 16)[0, first].flatten().tolist()]
        parts += [
            _weight(c, r, top, float(score[first + r, c]), bool(mask[first + r, c]))
            for r in range(rows)
            for c in range(16)
        ]
        parts += [_bar(c, top, rows) for c in range(width, 16, width)]
    return _svg(16 * CELL + 20, 8 * CELL + (8 // rows - 1) * GAP + 20, parts)


def _block() -> str:
    """How one block chooses its columns: by their sums, and by what rows gain."""
    score = torch.tensor([[9, 0, 4, 4, 0, 4], [0, 9, 4, 4, 0, 4], [0, 0, 4, 4, 9, 4], [0, 0, 4, 4, 9, 4]])
    pattern, parts = Pattern.parse("4:2:6"), []
    for place, (solver, name) in enumerate(SOLVERS.items()):
        selection, left = pattern.project(score, solver), place * 9 * CELL
        mask = pattern.mask(selection, 6)[0]
        assert selection.columns is not None
        parts += [_mark(c, 10, left) for c in selection.columns[0, 0, 0].tolist()]
        parts += [_number(c, r, 10, int(score[r, c]), bool(mask[r, c]), left) for r in range(4) for c in range(6)]
        parts.append(_text(10 + left, 10 + 4 * CELL + LINE, f"{name}: keeps {int((score * mask).sum())}"))
    return _svg(18 * CELL, 4 * CELL + 2 * LINE, parts)


def _weight(col: int, row: int, top: float, score: float, kept: bool) -> str:
    """A weight, as large as its score: blue where it stays, an outline where it goes."""
    side = (CELL - 4) * (0.35 + 0.65 * score)
    x, y = 10 + col * CELL + (CELL - side) / 2, top + row * CELL + (CELL - side) / 2
    look = f'fill="{KEPT}"' if kept else f'fill="none" stroke="{INK}" stroke-opacity="0.6"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}" rx="2" {look}/>'


def _number(col: int, row: int, top: float, value: int, kept: bool, left: float) -> str:
    """A weight as a number, on blue where it stays."""
    x, y, side = 11 + left + col * CELL, top + row * CELL + 1, CELL - 2
    box = f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" rx="2" fill="{KEPT if kept else CUT}"/>'
    return f"{box}{_text(x + side / 2, y + 14.5, str(value), 'middle', '#fff' if kept else INK)}"


def _mark(col: int, top: float, left: float = 0) -> str:
    """The mark above a column that rows share."""
    return (
        f'<rect x="{12 + left + col * CELL:g}" y="{top - 8:g}" width="{CELL - 4}" height="6" rx="2" fill="{SHARED}"/>'
    )


def _bar(col: int, top: float, rows: int) -> str:
    x = 10 + col * CELL
    return f'<path d="M{x} {top - 4}v{rows * CELL + 8}" stroke="{INK}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = INK) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="13.5">'
    return "\n".join([head, *parts, "</svg>", ""])


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, svg in pictures().items():
        (FOLDER / name).write_text(svg)
