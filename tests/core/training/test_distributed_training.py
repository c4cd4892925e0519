"""Two processes train what one trains on twice the batch, and end with the same bits."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from core.training.together import METHODS, PROGRAM, QUICK, STOPPED, Normed, Plain, gradients, tensors, traced, trained
from safetensors.torch import load_file
from torch import distributed as torch_distributed
from training_models import loop

from sparsec.errors import UsageError
from sparsec.program import Program
from sparsec.training import distributed
from sparsec.training.parts import Method
from sparsec.training.schedules import Repeated
from sparsec.training.updates import StraightThrough

WORKER = Path(__file__).with_name("together.py")
ANOTHER_ORDER = {"rtol": 1e-4, "atol": 2e-6}  # the same sums of samples, added in another order in float32

pytestmark = pytest.mark.skipif(
    not (torch_distributed.is_available() and torch_distributed.is_gloo_available()), reason="this torch has no gloo"
)


def started(arguments: list[str], world: int = 2) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip


@functools.cache
def plain() -> Program:
    return traced(Plain)


def left_by_two(part: str, folder: Path) -> Path:
    """What two processes leave."""
    plain().save(folder / PROGRAM)
    workers = started([str(WORKER), part, str(folder)])
    try:
        said = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [0, 0] == [worker.returncode for worker in workers], "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return left_by_two("quick", tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return left_by_two("whole", tmp_path_factory.mktemp("whole"))


def of(folder: Path, name: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"{name}.{rank}.safetensors") for rank in range(2)]


def check_as_alone(folder: Path, name: str) -> None:
    alone = tensors(trained(plain(), name, 16))
    first, second = of(folder, name)
    assert set(alone) == set(first)
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        if value.is_floating_point():
            torch.testing.assert_close(first[key], value, **ANOTHER_ORDER)
            assert torch.equal(first[key] == 0, value == 0)
        else:
            assert torch.equal(first[key], value)


def test_two_processes_train_what_one_trains_on_twice_the_batch(folder: Path) -> None:
    check_as_alone(folder, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_two_processes_what_it_trains_in_one(whole: Path, name: str) -> None:
    check_as_alone(whole, name)


def test_a_step_of_two_processes_has_the_gradient_of_its_samples(folder: Path) -> None:
    whole, accumulated, (first, second) = (
        gradients(plain()),
        gradients(plain(), size=8, accumulate=2),
        of(folder, "gradients"),
    )

    assert whole.keys() == accumulated.keys() == first.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name])
        for other in (accumulated[name], first[name]):
            assert torch.allclose(value, other, rtol=0, atol=4e-6 * float(value.abs().max()))


@pytest.mark.slow
def test_statistics_stay_the_same_in_all_processes(whole: Path) -> None:
    first, second = of(whole, "normed")

    running = [name for name in first if "running" in name]
    assert running
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    start = dict(traced(Normed).module.named_buffers())
    assert all(not torch.equal(first[name], start[name]) for name in running)


@pytest.mark.slow
def test_all_stop_where_one_was_told_to_and_go_on_together(whole: Path) -> None:
    first, second = of(whole, "resumed")
    for rank in range(2):
        said = (whole / f"stopped.{rank}.txt").read_text()
        assert f"the process was told to end after step {STOPPED} of 12; its state is kept in" in said

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert ["step-12"] == os.listdir(whole / "stopped")


@pytest.mark.slow
def test_process_0_alone_evaluates_and_logs_and_all_are_told(whole: Path) -> None:
    (first, second), (plain, _) = of(whole, "evaluated"), of(whole, "admm")

    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert all(torch.equal(value, plain[name]) for name, value in first.items())
    lines = [json.loads(line) for line in (whole / "log.0.jsonl").read_text().splitlines()]
    assert [6, 12] == [line["step"] for line in lines if "evaluation" in line]
    assert not (whole / "log.1.jsonl").exists()


def test_what_differs_is_named_and_what_process_0_holds_is_sent(folder: Path) -> None:
    for rank in range(2):
        said = json.loads((folder / f"said.{rank}.json").read_text())
        assert "up.weight is not the same in all 2 processes after step 7" in said["differs"]
        plain, found = said["shared"]
        assert {"words": [1, "two", None]} == plain
        assert {
            "a": ["torch.int64", [[0, 1, 2], [3, 4, 5]]],
            "b": ["torch.bfloat16", 1.5],
            "c": ["torch.float32", []],
        } == found
        assert said["nothing"] is None


def test_the_group_ends_with_its_threads(folder: Path) -> None:
    """One that is left and takes the GIL while Python ends aborts the process."""
    for rank in range(2):
        said = json.loads((folder / f"said.{rank}.json").read_text())
        assert not [name for name in said["threads"] if "gloo" in name]


def test_alone_there_is_no_group_and_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")

    assert distributed.Group(0, 1) == distributed.join()
    assert not torch_distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE and RANK must be numbers"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UsageError, match=message):
        distributed.join()


def test_sharded_parameters_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Linear(2, 2)
    distributed.refuse_sharded(net)
    net.weight.placements = ("Shard(0)",)  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"weight is split over processes \(DTensor"):
        distributed.refuse_sharded(net)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="ACCELERATE_USE_FSDP is set, but FSDP is not supported: the graph is flat"):
        trained(plain(), "admm", 8)


def test_a_state_of_another_number_of_processes_is_refused() -> None:
    method = Method(Repeated(2), StraightThrough(2e-4))
    made, other = loop(method), loop(method, size=8)
    made.run(2)
    state = made.state_dict()

    with pytest.raises(UsageError, match="the state to resume has batch_size 16; this training has 8"):
        other.load_state(*state)
    state[1]["processes"] = 2
    with pytest.raises(UsageError, match="the state to resume has processes 2; this training has 1"):
        loop(method).load_state(*state)
