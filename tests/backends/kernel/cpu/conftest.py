"""Random sparse weights for the CPU kernel tests; everything here needs the native library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.measuring import random_selection
from sparsec.layout import SparseLayout, compress
from sparsec.pattern import Pattern

MakeLayout = Callable[[str, int, int, int], SparseLayout]


@pytest.fixture(autouse=True)
def _library() -> Iterator[None]:
    if not library.supported():
        pytest.skip(library.unavailable_reason() or "no CPU kernels")
    # The dense references are tiny: waking other threads for them takes minutes when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def make_layout() -> MakeLayout:
    """(pattern, rows, cols, seed) -> a layout whose selection is random among the legal ones.

    `64:2:5@strip@moved`: the rows of a strip come from anywhere too.
    """

    def make(pattern: str, rows: int, cols: int, seed: int) -> SparseLayout:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, rows, cols, generator=generator)
        parsed = Pattern.parse(pattern.removesuffix("@moved"))
        score = torch.rand(1, rows, cols, generator=generator)
        selection = random_selection(parsed, score, pattern.endswith("@moved"), generator)
        return compress(weight, parsed, selection)

    return make
