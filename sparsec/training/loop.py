"""A plain training loop around the engine: AdamW, linear decay with warm-up, accumulation, clipping.

1. The order of samples follows from the seed and the epoch, dropout from the seed, the step and the process; the
   caller's generator is untouched, and nothing random has a state of its own.
2. Gradients are clipped before the engine adds to them: what it adds is scaled by neither clipping nor accumulation.
3. A loss or gradient that is no number stops training and names the step; nothing is stepped.
4. `state_dict` between two steps, loaded into a new loop of the same arguments, continues bit for bit.
5. Of several processes each trains on its part of every step; see `distributed`.
6. Where a method's `restart` says so, training begins anew before the step that follows a choice of sparser masks: what
   was judged and kept before is what was trained.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.errors import TrainingError, UsageError
from sparsec.pipeline import Progress, no_progress
from sparsec.program import Program
from sparsec.training.batches import Batch, Batches
from sparsec.training.distributed import Group
from sparsec.training.engine import Engine, State
from sparsec.training.model import LOSS, GraphModel, statistics
from sparsec.training.rounds import bounds
from sparsec.training.settings import Settings

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_MODEL, _OPTIMIZER, _ENGINE = "model:", "optimizer:", "engine:"


class DivergedError(TrainingError):
    """A loss or gradient is no number; parameters, moments and statistics are as the step before left them."""


class Loop:
    """Trains a model with an engine on batches. `run` may stop on the way; then its state can be taken."""

    def __init__(
        self,
        model: GraphModel,
        engine: Engine,
        batches: Batches,
        settings: Settings,
        seed: int = 0,
        progress: Progress = no_progress,
        optimizer: OptimizerFactory | None = None,
        task: str = "training",
        group: Group | None = None,
    ) -> None:
        if model.objective is None:
            raise UsageError("the loop needs a model with an objective: GraphModel(program, objective)")
        self.model, self.engine, self.settings, self.group = model, engine, settings, group or Group()
        self.seed, self.progress, self.task, self.objective = seed, progress, task, model.objective
        self.size = batches.size
        """Samples of a batch, in each process."""
        self.batches = dataclasses.replace(batches, size=batches.size * self.group.world)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise UsageError("there is nothing to train: requires_grad is False for every parameter")
        self.device = self.parameters[0].device
        self.after_step: Callable[[], None] = lambda: None
        """Called between two steps, when the state may be taken; after an epoch's last, once the engine ended it."""
        make = optimizer or (
            lambda some: torch.optim.AdamW(some, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
        )
        self.optimizer = make(self.parameters)
        self.per_epoch = math.ceil(len(self.batches.epoch(seed, 0)) / settings.accumulate)
        self.steps = self.per_epoch * settings.epochs
        self.losses: list[float] = []
        """Of every step that is done."""
        self.norm = 0.0
        """Of the last step's gradient, before it was clipped."""
        self.samples, self.seconds = 0, 0.0
        """What this process's steps took, since it began."""
        self._statistics = statistics(engine.program.module)
        engine.begin(self.steps, self.per_epoch)
        restart, free = engine.method.restart, [one.site for one in engine.sites if one.selection is None]
        self._bounds = (0, self.steps) if restart == "no" else bounds(engine.method.schedule, free, engine.clock)
        self._first = {name: value.clone() for name, value in self.tensors().items()} if restart == "all" else {}

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return len(self.losses)

    @property
    def epoch_ended(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self.step > 0 and self.step % self.per_epoch == 0

    def run(self, until: int | None = None) -> None:
        """Train to step `until`, or to the end."""
        last = self.steps if until is None else min(until, self.steps)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):  # rule 1
            self.model.train()
            try:
                while self.step < last:
                    self._epoch(last)
            finally:
                self.model.eval()
        self._tell()

    def finish(self) -> Program:
        """The trained program: exact zeros, no masks, every gradient gone. See `Engine.end`."""
        for parameter in self.parameters:
            parameter.grad = None
        return self.engine.end(self.optimizer)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, and buffers that training may write, by name; not the masks, which are the engine's."""
        buffers = {name: value for name, value in self.model.named_buffers() if value.dtype != torch.bool}
        return {**dict(self.model.named_parameters()), **buffers}

    def _tell(self) -> None:
        loss = f" loss {self.losses[-1]:.3g}" if self.losses else ""
        self.progress(self.task + loss, self.step, self.steps)

    def _epoch(self, last: int) -> None:
        number, done = divmod(self.step, self.per_epoch)
        order, size = self.batches.epoch(self.seed, number), self.settings.accumulate
        steps = [order[i : i + size] for i in range(0, len(order), size)]
        for batches in steps[done : done + last - self.step]:
            self._tell()
            start = time.perf_counter()
            self._step(batches)
            if self.epoch_ended:
                self.engine.epoch_end(self.optimizer)
            self.seconds += time.perf_counter() - start
            self.samples += sum(len(next(iter(batch.values()))) for batch in batches)
            self.after_step()

    def _step(self, batches: list[Batch]) -> None:
        if 0 < self.step == self._round(self.step)[0]:
            self._restart()
        for parameter in self.parameters:
            parameter.grad = None
        before = [value.clone() for value in self._statistics]
        self._draw(self.group.rank + 1)
        loss = self.group.agree(self._gradients(batches), self.parameters)
        self.group.add_gradients(self.parameters)
        self._draw(0)  # what the engine draws is the same in all processes
        self.norm = float(nn.utils.get_total_norm([one.grad for one in self.parameters if one.grad is not None]))
        for what, value in (("loss", loss), ("gradient's norm", self.norm)):
            if not math.isfinite(value):  # rule 3
                for now, old in zip(self._statistics, before, strict=True):
                    now.copy_(old)
                raise DivergedError(
                    f"the {what} is {value:g} at step {self.step + 1} of {self.steps}; training stopped before it "
                    "changed anything: lower lr (or rho), or look for NaN in the data and weights"
                )
        self.group.average(self._statistics)
        self.engine.observe()
        if self.settings.max_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.settings.max_grad_norm, torch.tensor(self.norm))
        self.engine.pre_step()  # rule 2
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.engine.post_step(self.optimizer)
        self.losses.append(loss)

    def rate(self, step: int) -> float:
        """Learning rate of a step, the first is 0; it rises and falls within a round."""
        begin, end = self._round(step)
        return self.settings.rate(step - begin, end - begin)

    def _round(self, step: int) -> tuple[int, int]:
        """The first step of the round that a step is in, and that of the round after it."""
        number = bisect.bisect(self._bounds, step)
        return self._bounds[number - 1], self._bounds[number]

    @torch.no_grad()
    def _restart(self) -> None:
        """Rule 6."""
        self.optimizer.state.clear()
        for name, value in self._first.items():
            self.tensors()[name].copy_(value)

    def _gradients(self, batches: list[Batch]) -> float:
        """Add up this process's part of the gradients; returns its part of the loss."""
        counts, total = self.objective.counts(batches), 0.0
        for batch in batches:
            part = self.group.part(batch, self.size)
            if part is None:
                continue
            there = {name: value.to(self.device, non_blocking=True) for name, value in part.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
                loss = self.model.with_loss(there, counts)[LOSS]
            total += float(loss.detach())
            if not math.isfinite(total):
                break
            loss.backward()
        return total

    def _draw(self, stream: int) -> None:
        """Seed all generators for one of this step's streams of random numbers (rule 1)."""
        digest = hashlib.sha256(f"{self.seed}:{self.step}:{stream}".encode()).digest()
        number = int.from_bytes(digest[:8], "little")
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(number)

    def state_dict(self) -> State:
        """Everything that changes while training, as tensors and plain data."""
        tensors = {f"{_MODEL}{name}": value.detach() for name, value in self.tensors().items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{index}:{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        engine, plain = self.engine.state_dict()
        tensors |= {f"{_ENGINE}{name}": value for name, value in engine.items()}
        return tensors, {"engine": plain, "optimizer": scalars, "losses": self.losses, **self._own()}

    def _own(self) -> dict[str, Any]:
        """What the bits of a training depend on beside method and patterns, which the engine checks."""
        own = {"settings": repr(self.settings), "data": self.batches.sha256, "seed": self.seed}
        return own | {"batch_size": self.size, "processes": self.group.world, "loss": repr(self.objective)}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UsageError when it is of other settings, data, seed or method."""
        for key, value in self._own().items():
            if plain.get(key) != value:
                raise UsageError(
                    f"the state to resume has {key} {plain.get(key)}; this training has {value}: start anew"
                )
        self.engine.load_state(_part(tensors, _ENGINE), plain["engine"])
        for name, value in self.tensors().items():
            value.copy_(tensors[f"{_MODEL}{name}"])
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in plain["optimizer"].items()}
        for name, tensor in _part(tensors, _OPTIMIZER).items():
            index, _, key = name.partition(":")
            state.setdefault(int(index), {})[key] = tensor.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.losses = list(plain["losses"])


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
