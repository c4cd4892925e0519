"""Mapped weights take no memory until they are read, give it back, and never reach the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from memory import resident
from safetensors import safe_open
from safetensors.torch import save_file

from sparsec.mapping import release

MEGABYTE = 1 << 20
BIG = 32 * MEGABYTE  # bytes; noise of the allocator is far below


@pytest.fixture
def mapped(tmp_path: Path) -> torch.Tensor:
    values = torch.randint(-100, 100, (BIG // 2,), generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"other": torch.ones(3), "w": values.view(-1, 1024)}, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor("w")
    return tensor


def test_release_gives_resident_pages_back_and_values_stay(mapped: torch.Tensor) -> None:
    total = int(mapped.long().sum())
    before = resident("RssFile")

    released = release(mapped)

    assert released >= BIG
    assert before - resident("RssFile") > 0.9 * BIG
    assert total == int(mapped.long().sum())
    assert resident("RssFile") > before - 0.1 * BIG  # read again


def test_release_leaves_ordinary_memory_alone() -> None:
    ordinary = torch.arange(BIG // 8)
    expected = ordinary.clone()

    assert 0 == release(ordinary)
    assert torch.equal(ordinary, expected)


def test_what_was_written_stays_in_memory_and_never_reaches_the_file(mapped: torch.Tensor, tmp_path: Path) -> None:
    file = (tmp_path / "a.safetensors").read_bytes()
    mapped[5, :] = 7.0
    mapped[-1, -1] = 9.0

    release(mapped)

    assert (mapped[5] == 7).all()
    assert mapped[-1, -1] == 9
    assert file == (tmp_path / "a.safetensors").read_bytes()


def test_empty_strided_and_meta_tensors_are_left_alone(mapped: torch.Tensor) -> None:
    assert 0 == release(torch.empty(0), mapped[:, ::2], torch.empty(4, device="meta"))
