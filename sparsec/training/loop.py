"""A plain training loop around the engine: AdamW, linear decay with warm-up, accumulation, clipping. One process.

1. The order of samples follows from the seed and the epoch, dropout from the seed; the caller's generator is untouched.
2. Gradients are clipped before the engine adds to them: what it adds is scaled by neither clipping nor accumulation.
3. A loss that is no number stops training and names the step; nothing is stepped.
4. `state_dict` between two steps, loaded into a new loop of the same arguments, continues bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.errors import TrainingError, UsageError
from sparsec.pipeline import Progress, no_progress
from sparsec.program import Program
from sparsec.training.batches import Batch, Batches
from sparsec.training.engine import Engine, State
from sparsec.training.model import LOSS, GraphModel

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
_MODEL, _OPTIMIZER, _ENGINE, _RANDOM = "model:", "optimizer:", "engine:", "random"


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train."""

    epochs: int = 3
    lr: float = 5e-5
    accumulate: int = 1
    """Batches of an optimizer step."""
    max_grad_norm: float = 1.0
    """0: no clipping."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "lr": self.lr, "accumulate": self.accumulate}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value:g}; expected a number above 0")
        for name, value in {"max_grad_norm": self.max_grad_norm, "weight_decay": self.weight_decay}.items():
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is {value:g}; expected 0 or more")
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup is {self.warmup:g}; expected a share of the steps, from 0 to below 1")

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, the first is 0: linearly up, then linearly down to 0 after the last."""
        rising = self.warmup * steps
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        return self.lr * (steps - step) / max(steps - rising, 1)


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
    ) -> None:
        if model.objective is None:
            raise UsageError("the loop needs a model with an objective: GraphModel(program, objective)")
        self.model, self.engine, self.batches, self.settings = model, engine, batches, settings
        self.seed, self.progress, self.task, self.objective = seed, progress, task, model.objective
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        make = optimizer or (
            lambda some: torch.optim.AdamW(some, lr=settings.lr, weight_decay=settings.weight_decay, foreach=False)
        )
        self.optimizer = make(self.parameters)
        self.per_epoch = math.ceil(len(batches.epoch(seed, 0)) / settings.accumulate)
        self.steps = self.per_epoch * settings.epochs
        self.losses: list[float] = []
        """Of every step that is done."""
        self._random: Tensor | None = None
        engine.begin(self.steps, self.per_epoch)

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return len(self.losses)

    def run(self, until: int | None = None) -> None:
        """Train to step `until`, or to the end."""
        last = self.steps if until is None else min(until, self.steps)
        with torch.random.fork_rng(devices=[]):  # rule 1
            if self._random is None:
                torch.manual_seed(self.seed)
            else:
                torch.set_rng_state(self._random)
            self.model.train()
            try:
                while self.step < last:
                    self._epoch(last)
            finally:
                self._random = torch.get_rng_state()
                self.model.eval()
        self.progress(self.task, self.step, self.steps)

    def finish(self) -> Program:
        """The trained program: exact zeros, no masks, every gradient gone. See `Engine.end`."""
        for parameter in self.parameters:
            parameter.grad = None
        return self.engine.end(self.optimizer)

    def _epoch(self, last: int) -> None:
        number, done = divmod(self.step, self.per_epoch)
        order, size = self.batches.epoch(self.seed, number), self.settings.accumulate
        steps = [order[i : i + size] for i in range(0, len(order), size)]
        for group in steps[done : done + last - self.step]:
            self.progress(self.task, self.step, self.steps)
            self._step(group)
        if self.step % self.per_epoch == 0:
            self.engine.epoch_end(self.optimizer)

    def _step(self, group: list[Batch]) -> None:
        counts, total = self.objective.counts(group), 0.0
        for parameter in self.parameters:
            parameter.grad = None
        for batch in group:
            loss = self.model.with_loss(batch, counts)[LOSS]
            total += float(loss.detach())
            if not math.isfinite(total):  # rule 3
                raise TrainingError(
                    f"the loss is {total:g} at step {self.step + 1} of {self.steps}; training stopped, nothing is "
                    "kept: lower lr (or rho), or look for NaN in the data and weights"
                )
            loss.backward()
        self.engine.observe()
        if self.settings.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.engine.pre_step()  # rule 2
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self.settings.rate(self.step, self.steps)
        self.optimizer.step()
        self.engine.post_step(self.optimizer)
        self.losses.append(total)

    def state_dict(self) -> State:
        """Everything that changes while training, as tensors and plain data."""
        tensors = {f"{_MODEL}{name}": value.detach() for name, value in _named(self.model).items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{index}:{key}"] = value
                else:
                    scalars.setdefault(str(index), {})[key] = value
        engine, plain = self.engine.state_dict()
        tensors |= {f"{_ENGINE}{name}": value for name, value in engine.items()}
        if self._random is not None:
            tensors[_RANDOM] = self._random
        made = {"engine": plain, "optimizer": scalars, "losses": self.losses, "seed": self.seed}
        return tensors, made | {"settings": repr(self.settings), "data": self.batches.sha256}

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises UsageError when it is of other settings, data, seed or method."""
        own = {"settings": repr(self.settings), "data": self.batches.sha256, "seed": self.seed}
        for key, value in own.items():
            if plain[key] != value:
                raise UsageError(f"the state to resume has {key} {plain[key]}; this training has {value}: start anew")
        self.engine.load_state(_part(tensors, _ENGINE), plain["engine"])
        for name, value in _named(self.model).items():
            value.copy_(tensors[f"{_MODEL}{name}"])
        state: dict[int, dict[str, Any]] = {int(i): dict(values) for i, values in plain["optimizer"].items()}
        for name, tensor in _part(tensors, _OPTIMIZER).items():
            index, _, key = name.partition(":")
            state.setdefault(int(index), {})[key] = tensor.clone()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.losses, self._random = list(plain["losses"]), tensors.get(_RANDOM)


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that training writes; the masks, which are the engine's, are not among them."""
    buffers = {name: value for name, value in model.named_buffers() if value.dtype != torch.bool}
    return {**dict(model.named_parameters()), **buffers}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
