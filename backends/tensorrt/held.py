"""Whether an engine holds a weight, found without loading it: its bytes are looked for in the file.

TensorRT-RTX stores weights as they are, (outputs, inputs), or, where it merges products that share an input,
transposed, with those of the others beside each row.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BESIDE = 16  # most weights whose rows lie beside each other


def count(engine: Path, weights: Iterable[Tensor]) -> int:
    """How many of the weights, (outputs, inputs), it holds bit for bit."""
    if not engine.stat().st_size:
        return 0  # which mmap does not take
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return sum(_lies(data, weight) or _lies(data, weight.T) for weight in weights)


def _lies(data: mmap.mmap, matrix: Tensor) -> bool:
    """Whether the rows lie in the data, at any equal distance."""
    import torch

    if not bool(matrix[:2].any(1).all()):
        return False  # zeros lie everywhere: they would tell nothing about where to look
    rows = [row.tobytes() for row in matrix.contiguous().view(torch.uint8).numpy()]
    size = len(rows[0])
    start = data.find(rows[0])
    while start >= 0:
        second = data.find(rows[1], start + size, start + (_BESIDE + 1) * size) if len(rows) > 1 else start + size
        step = second - start
        if second >= 0 and all(data[start + i * step : start + i * step + size] == row for i, row in enumerate(rows)):
            return True
        start = data.find(rows[0], start + 1)
    return False
