"""Pictures of one matrix as PNG data: two maps of the whole, and a close-up in which every weight can be seen.

Pictures have no ground of their own: numbers are opacity, so they fit a light and a dark page.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.pattern import NM, Pattern, SharedColumns, Strip

if TYPE_CHECKING:
    from torch import Tensor

_KEPT, _SHARED = (47, 129, 224), (226, 138, 36)  # blue, orange: told apart with any colour vision
_LEVELS = 14  # of opacity; 15 colours and nothing fit 4 bits
_LEVEL_OF_SHARED = _LEVELS + 1
_FAINTEST = 0.12  # opacity of the lowest number that is drawn
_BOLD = 0.35  # of a close-up's least weight, as a share of the levels
_CELL = 4  # pixels of a weight in a close-up, the last one a gap
_LARGEST_MAP, _CLOSE = 112, 50 * 56  # points
_TALLEST = 64  # rows of a close-up


@dataclass(frozen=True)
class Picture:
    """One picture, and what it shows in words."""

    title: str
    words: str
    png: str
    """A data: address."""
    width: int
    height: int
    kind: str
    """`map` or `close-up`."""


@dataclass(frozen=True)
class Sizes:
    """How many points a map and a close-up may have."""

    points: int
    close: int

    @staticmethod
    def shared(points: int, close: int, sites: int) -> Sizes:
        """An equal share of all points for each site."""
        sites = max(sites, 1)
        return Sizes(min(points // sites, _LARGEST_MAP**2), min(close // sites, _CLOSE))


def of(weight: Tensor, pattern: Pattern, sizes: Sizes) -> tuple[Picture, ...]:
    """Pictures of a pruned matrix (rows, cols), the rows of a block together."""
    kept = weight != 0
    return (
        _density(kept, sizes.points),
        _magnitude(weight, sizes.points),
        _close_up(weight, kept, pattern, sizes.close),
    )


def _density(kept: Tensor, points: int) -> Picture:
    pooled, size = _pooled(kept.float(), points)
    low, high = float(pooled.min()), float(pooled.max())
    words = f"Share of weights that are kept, {100 * low:.0f} to {100 * high:.0f} %"
    return _map("Mask density", words, pooled, size)


def _magnitude(weight: Tensor, points: int) -> Picture:
    words = "Mean magnitude of stored weights, zeros counted: rows and columns that matter more stand out"
    return _map("Magnitude", words, *_pooled(weight.abs(), points))


def _map(title: str, words: str, pooled: Tensor, size: tuple[int, int]) -> Picture:
    """Numbers from the lowest (faint) to the highest, of 200 the highest two left out: single ones would hide all."""
    import torch

    low = pooled.min()
    high = torch.quantile(pooled.flatten()[: 1 << 20], 0.99).clamp(min=float(low))
    span = float(high - low)
    share = ((pooled - low) / span).clamp(0, 1) if span > 0 else torch.ones_like(pooled)
    each = "" if size == (1, 1) else f"; a point is {size[0]} x {size[1]} weights"
    return _picture(title, words + each + ".", _levels(share), "map")


def _pooled(matrix: Tensor, points: int) -> tuple[Tensor, tuple[int, int]]:
    """(rows, cols) -> means of squares, about `points` of them, and the sides of a square."""
    import torch

    rows, cols = matrix.shape
    side = max(math.ceil(math.sqrt(rows * cols / points)), 1)
    size = (min(side, rows), min(side, cols))
    return torch.nn.functional.avg_pool2d(matrix[None, None], size, ceil_mode=True)[0, 0], size


def _levels(share: Tensor) -> Tensor:
    """0..1 -> levels 1.._LEVELS."""
    import torch

    return (share * (_LEVELS - 1)).round().to(torch.uint8) + 1


def _close_up(weight: Tensor, kept: Tensor, pattern: Pattern, points: int) -> Picture:
    """Single weights about the border of the first two blocks, so that blocks can be seen."""
    import torch

    rows, cols = weight.shape
    m = pattern.m if isinstance(pattern, NM | SharedColumns) else 1
    block = pattern.v if isinstance(pattern, SharedColumns) else 1
    groups = 0 if isinstance(pattern, Strip) else m  # the columns of a strip come from anywhere
    wide = min(cols, max(50 // m * m, m), max(points // 16, 1))
    tall = min(rows, max(points // wide, 1), _TALLEST)
    start = max(0, min(block - tall // 2, rows - tall)) if block > 1 else 0
    levels = torch.zeros(rows, cols, dtype=torch.uint8)
    if block > 1:
        for first in range(0, rows, block):
            used = kept[first : first + block].any(0)
            levels[first : first + block, used] = _LEVEL_OF_SHARED
    part, sizes = levels[start : start + tall, :wide], weight[start : start + tall, :wide].abs()
    shares = _BOLD + (1 - _BOLD) * sizes / sizes.max().clamp(min=1e-30)
    part[sizes != 0] = _levels(shares)[sizes != 0]
    words = f"Rows {start} to {start + tall - 1}, columns 0 to {wide - 1}. Blue: kept, stronger where larger."
    if block > 1:
        words += f" Orange: a column that other rows of the same {block} keep. A gap between rows ends a block"
        words += f", between columns a group of {m}." if groups else "."
    elif groups > 1:
        words += f" A gap between columns ends a group of {m}."
    return _picture("Close up", words, _spread(part, start, block, groups), "close-up")


def _spread(part: Tensor, start: int, block: int, group: int) -> Tensor:
    """Each weight as a square with a gap, a wider gap where a block of rows or a group of columns ends."""
    import torch

    rows, cols = part.shape
    down = [_CELL * i + _CELL * ((start + i) // block - start // block if block > 1 else 0) for i in range(rows)]
    across = [_CELL * i + (_CELL // 2 * (i // group) if group > 1 else 0) for i in range(cols)]
    drawn = torch.zeros(down[-1] + _CELL - 1, across[-1] + _CELL - 1, dtype=torch.uint8)
    for y in range(_CELL - 1):
        for x in range(_CELL - 1):
            drawn[torch.tensor(down)[:, None] + y, torch.tensor(across)[None] + x] = part
    return drawn


def _picture(title: str, words: str, levels: Tensor, kind: str) -> Picture:
    from PIL import Image

    image = Image.fromarray(levels.numpy(), "P")
    image.putpalette(bytes([0, 0, 0, *_KEPT * _LEVELS, *_SHARED]))
    steps = [_FAINTEST + (1 - _FAINTEST) * i / (_LEVELS - 1) for i in range(_LEVELS)]
    opacity = bytes([0, *(round(255 * step) for step in steps), 90])
    file = io.BytesIO()
    image.save(file, "PNG", bits=4, transparency=opacity, optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return Picture(title, words, f"data:image/png;base64,{data}", levels.shape[1], levels.shape[0], kind)
