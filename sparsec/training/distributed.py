"""Several processes that train one program: torchrun and `accelerate launch` start them, `join` brings them together.

1. A step takes `size` samples for each process, which it cuts out of the step's batches: none may be left for it.
2. Losses and gradients are added up before anything looks at them, so all processes make the same step, and weights and
   masks stay equal bit for bit; `check_same` proves it.
3. Process 0 alone writes and evaluates. What it read from disk the others are sent: only it needs to see the files.
4. Batch norm sees its process's samples alone; its running statistics are averaged after every step.
Parameters that are split over processes (FSDP, ZeRO) are refused: the graph is flat and reads whole weights.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from sparsec import graph, resuming
from sparsec.errors import TrainingError, UsageError
from sparsec.training.engine import State

_BUCKET = 64 << 20  # bytes that are added up in one go: few messages, little memory
_PATIENCE = timedelta(days=1)  # others wait while process 0 measures and writes; a lost one closes its connection
_SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


@dataclass(frozen=True)
class Group:
    """This process among those that train together; alone, nothing is sent."""

    rank: int = 0
    world: int = 1

    def part(self, batch: Mapping[str, Tensor], size: int) -> dict[str, Tensor] | None:
        """This process's samples of a step's batch, at most `size`; None when none are left for it."""
        chosen = {name: value[self.rank * size : (self.rank + 1) * size] for name, value in batch.items()}
        return chosen if len(next(iter(chosen.values()))) else None

    def agree(self, loss: float, parameters: Sequence[nn.Parameter]) -> float:
        """The loss of all; a parameter that got a gradient anywhere gets one everywhere, zeros."""
        if self.world == 1:
            return loss
        found = [loss, *(float(one.grad is not None) for one in parameters)]
        sums = torch.tensor(found, dtype=torch.float64, device=_device())
        distributed.all_reduce(sums)
        for one, count in zip(parameters, sums[1:].tolist(), strict=True):
            if count and one.grad is None:
                one.grad = torch.zeros_like(one)
        return float(sums[0])

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Add up gradients, in place, a few large messages in all. `agree` comes before."""
        if self.world > 1:
            for bucket in _buckets([one.grad for one in parameters if one.grad is not None]):
                _reduce(bucket)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """The mean over processes, in place."""
        for bucket in _buckets(tensors) if self.world > 1 else ():
            _reduce(bucket)
            for one in bucket:
                one.div_(self.world)

    def most(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.world == 1:
            return value
        found = torch.tensor([value], device=_device())
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return int(found)

    def check_same(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raise TrainingError, on all processes, for the first tensor that is not the same in all."""
        if self.world == 1:
            return
        hashes = [int(graph.content_hash(value), 16) for value in tensors.values()]
        low = torch.tensor(hashes, device=_device())
        high = low.clone()
        distributed.all_reduce(low, distributed.ReduceOp.MIN)
        distributed.all_reduce(high, distributed.ReduceOp.MAX)
        if wrong := [name for name, one, other in zip(tensors, low, high, strict=True) if one != other]:
            raise TrainingError(
                f"{wrong[0]} is not the same in all {self.world} processes {when}; expected equal bits, which needs "
                "the same model, data and versions everywhere: start all processes with the same command on machines "
                "of one kind"
            )

    def share(self, state: State | None) -> State | None:
        """What process 0 holds, on all of them: tensors on the CPU."""
        if self.world == 1:
            return state
        tensors, plain = state or ({}, {})
        kinds = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
        text = json.dumps([state is not None, plain, kinds]).encode()
        length = self.most(len(text) if self.rank == 0 else 0)
        sent = self._sent(torch.frombuffer(bytearray(text), dtype=torch.uint8), length)
        there, plain, kinds = json.loads(sent.numpy().tobytes())
        found = {}
        for name, (kind, shape) in kinds.items():
            dtype = getattr(torch, kind)
            given = tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8) if self.rank == 0 else torch.empty(0)
            found[name] = self._sent(given, torch.Size(shape).numel() * dtype.itemsize).view(dtype).reshape(shape)
        return (found, plain) if there else None

    def _sent(self, given: Tensor, count: int) -> Tensor:
        """`count` bytes of process 0."""
        value = given.to(_device()) if self.rank == 0 else torch.empty(count, dtype=torch.uint8, device=_device())
        if count:
            distributed.broadcast(value, 0)
        return value.cpu()

    def told(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Plain data of process 0; it waits for that, however long it takes."""
        state = self.share(({}, plain))
        assert state is not None
        return state[1]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.most(0)


def join() -> Group:
    """The group of this process, from the environment that launchers set; joined once, left when Python ends."""
    if not distributed.is_available():
        return Group()
    if not distributed.is_initialized():
        if rank_in_environment() is None:
            return Group()
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UsageError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {missing[0]} is not set, so the processes cannot meet; "
                "start them with torchrun or accelerate launch, or unset WORLD_SIZE"
            )
        # Its functions' defaults hold the group of the moment it is imported (torch 2.13): after `init_process_group`,
        # the group would outlive `leave`, and a thread of it that takes the GIL while Python ends aborts the process.
        importlib.import_module("torch.distributed.nn.functional")
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
        atexit.register(leave)
    return Group(distributed.get_rank(), distributed.get_world_size())


def leave() -> None:
    """End the group and its threads; once is enough."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextlib.contextmanager
def working(group: Group, out: Path, key: dict[str, Any], resume: bool) -> Iterator[Path]:
    """`resuming.working` in process 0; the others join in its folder."""
    if group.rank:
        group.barrier()
        yield resuming.joined(out, key)
        return
    with resuming.working(out, key, resume) as folder:
        group.barrier()
        yield folder


def rank_in_environment() -> int | None:
    """Which of several processes a launcher says this is; None alone."""
    try:
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "-1"))
    except ValueError as error:
        raise UsageError(f"WORLD_SIZE and RANK must be numbers: {error}; start with torchrun or unset them") from error
    return rank if world > 1 and rank >= 0 else None


def refuse_sharded(module: nn.Module) -> None:
    """Raise UsageError where parameters are split over processes, or a launcher is set up to split them."""
    reason = "is not supported: the graph is flat and its passes read whole weights"
    what = "start without it: every process then holds the whole model"
    for variable, name in _SHARDED.items():
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            raise UsageError(f"{variable} is set, but {name} {reason}; {what}")
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "placements"):  # a DTensor, without loading torch.distributed.tensor
            raise UsageError(f"{name} is split over processes (DTensor, as in FSDP), which {reason}; {what}")


def _device() -> torch.device:
    """Where numbers are sent from: the CPU unless the group was made for CUDA alone."""
    on_cpu = "cpu:" in distributed.get_backend_config()
    return torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Runs of tensors of one type and device, `_BUCKET` bytes or one tensor each."""
    made: list[list[Tensor]] = []
    nbytes = 0
    for one in tensors:
        fits = made and (made[-1][0].dtype, made[-1][0].device) == (one.dtype, one.device)
        if not fits or nbytes + one.nbytes > _BUCKET:
            made.append([])
            nbytes = 0
        made[-1].append(one)
        nbytes += one.nbytes
    return made


def _reduce(bucket: list[Tensor]) -> None:
    flat = torch.cat([one.reshape(-1) for one in bucket])
    distributed.all_reduce(flat)
    for one, part in zip(bucket, flat.split([one.numel() for one in bucket]), strict=True):
        one.copy_(part.view_as(one))
