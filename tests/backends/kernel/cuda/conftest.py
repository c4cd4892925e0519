"""Random sparse weights for the GPU kernels."""

from __future__ import annotations

import types
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from native.recording import Driver

from sparsec.backends.kernel.cuda import driver
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


@pytest.fixture
def cuda(monkeypatch) -> Driver:
    """A machine with one Hopper GPU, as far as torch and the driver are asked."""
    made = Driver()
    driver.tensor_map.cache_clear()
    hopper = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448, name="H200"
    )
    zeros = torch.zeros
    monkeypatch.setattr(driver, "_driver", lambda: made)
    monkeypatch.setattr(driver, "cubin", lambda kernel, macros, arch: f"{kernel} {arch}".encode())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: hopper)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=77))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "zeros", lambda *sizes, dtype, device: zeros(*sizes, dtype=dtype))
    return made
