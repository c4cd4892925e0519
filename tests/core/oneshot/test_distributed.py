"""Two processes of torch.distributed give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from core.oneshot.test_engine import Stack, batches, pruned, traced
from core.oneshot.worker import METHODS, tensors
from models import made
from safetensors.torch import load_file
from torch import distributed

WORKER = Path(__file__).with_name("worker.py")
ANOTHER_ORDER = {"rtol": 1e-4, "atol": 1e-6}  # the same sums of batches, added in another order in float64

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def products_in_float32() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # tile units round inputs to 16 bits: another order shows more there
        patch.setenv("SPARSEC_ISA", "avx512")
        yield


@pytest.fixture(scope="module")
def folder(products_in_float32: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave."""
    found = tmp_path_factory.mktemp("together")
    workers = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", found], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [0, 0] == [worker.returncode for worker in workers], "\n".join(said)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_keep_the_same_weights_as_one(folder: Path, name: str) -> None:
    alone = tensors(pruned(traced(made(Stack), 20, 8), batches(20, 8, count=5), METHODS[name])[0])
    first, second = (load_file(folder / f"{name}.{rank}.safetensors") for rank in range(2))

    assert set(alone) == set(first)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, **ANOTHER_ORDER)


def test_processes_write_one_journal(folder: Path) -> None:
    expected = [f"layers.{i}.weight.safetensors" for i in range(3)]

    assert expected == sorted(path.name for path in (folder / "journal").iterdir())


def test_every_process_learns_what_does_not_fit(folder: Path) -> None:
    for rank in range(2):
        other, few, gradients = json.loads((folder / f"errors.{rank}.json").read_text())
        assert "the 2 processes were given 3, 4 calibration batches; give every process the same batches" in other
        assert "the 2 processes were given 1, 1 calibration batches" in few
        assert "score taylor is gathered by one process; run it without torch.distributed" == gradients
