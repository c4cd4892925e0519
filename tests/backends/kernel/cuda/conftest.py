"""Random sparse weights for the GPU kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparsec.backends.kernel.measuring import random_selection
from sparsec.layout import SparseLayout, compress
from sparsec.pattern import Pattern

MakeLayout = Callable[..., SparseLayout]


@pytest.fixture(scope="session")
def make_layout() -> MakeLayout:
    """(pattern, rows, cols, dtype) -> a layout whose selection is random among the legal ones.

    `64:2:5@strip@moved`: the rows of a strip come from anywhere too.
    """

    def make(pattern: str, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> SparseLayout:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(1, rows, cols, generator=generator).to(dtype)
        parsed = Pattern.parse(pattern.removesuffix("@moved"))
        score = torch.rand(1, rows, cols, generator=generator)
        return compress(weight, parsed, random_selection(parsed, score, pattern.endswith("@moved"), generator))

    return make
