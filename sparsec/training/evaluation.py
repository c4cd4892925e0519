"""Judging a program while it is trained: after each epoch, on the weights that would be kept if training ended then.

It changes no bit of the training. With `best`, the weights and selections of the best epoch are left in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsec.errors import UsageError
from sparsec.pipeline import Context
from sparsec.program import Program
from sparsec.selection import Selection
from sparsec.training import metrics
from sparsec.training.batches import Batch, resolve
from sparsec.training.engine import State
from sparsec.training.labelled import Labelled
from sparsec.training.labels import Task
from sparsec.training.loop import Loop
from sparsec.training.losses import LABELS, NextToken, Objective

Keep = Literal["last", "best"]
_WEIGHT, _SELECTION = "weight:", "selection:"


@dataclass(frozen=True)
class Held:
    """Data to judge by, which are not trained on."""

    batches: Sequence[Batch]
    task: Task
    sha256: str


def held(
    ctx: Context, name: str, who: str, program: Program, size: int, objective: Objective, keep: Keep
) -> Held | None:
    """`ctx.resources[name]`, as `batches.resolve`; None where there is none.

    Raises UsageError where there is nothing to choose the best by.
    """
    found = ctx.resources.get(name)
    if found is None:
        if keep == "best":
            raise UsageError(
                f"pass {who}: keep=best needs data to judge by: give --eval DATA, or in Python batches that are not "
                f'trained on, resources={{"{name}": [...]}}'
            )
        return None
    made = found() if callable(found) else found
    data = resolve(Context(resources={name: made}), name, who, program, size)
    task = made.task if isinstance(made, Labelled) else _task(objective, data.groups[0])
    if not metrics.metrics_for(task):
        raise UsageError(f"pass {who}: {name}: there are no labels to judge by; give data with labels")
    cut = [
        {key: value[i : i + size] for key, value in group.items()}
        for group in data.groups
        for i in range(0, len(next(iter(group.values()))), size)
    ]
    return Held(cut, task, data.sha256)


class Evaluator:
    """The figures of every epoch, and the best weights where they are to be kept."""

    def __init__(self, data: Held, keep: Keep = "last") -> None:
        self.data, self.keep, self.main = data, keep, metrics.main_metric(data.task)
        self.found: list[dict[str, float]] = []
        """One for each epoch: its last step, and the figures by name."""
        self._best: tuple[dict[str, Tensor], dict[str, Selection]] | None = None

    @property
    def best(self) -> int:
        """The index in `found` of the best epoch, the first of equals."""
        sign = 1 if metrics.bigger_is_better(self.main) else -1
        return max(range(len(self.found)), key=lambda i: sign * self.found[i][self.main])

    def run(self, loop: Loop) -> dict[str, float]:
        """Judge what `Engine.end` would leave now. Process 0 does; the others are told."""
        with loop.engine.pruned() as chosen:
            figures = self._judge(loop) if loop.group.rank == 0 else {}
            figures = loop.group.told(figures)
            self.found.append({"step": loop.step, **figures})
            if self.keep == "best" and self.best == len(self.found) - 1:
                weights = {name: value.detach().clone() for name, value in loop.tensors().items()}
                self._best = weights, dict(chosen)
        return figures

    def _judge(self, loop: Loop) -> dict[str, float]:
        def run(**inputs: Tensor) -> dict[str, Tensor]:
            found = loop.model.outputs({name: value.to(loop.device) for name, value in inputs.items()})
            return {name: value.cpu() for name, value in found.items()}

        loop.model.eval()
        try:
            return metrics.evaluate(run, self.data.batches, self.data.task)
        finally:
            loop.model.train()

    @torch.no_grad()
    def restore(self, loop: Loop) -> None:
        """Put the best weights and selections back, if they are what is kept."""
        if self._best is None:
            return
        weights, chosen = self._best
        loop.engine.settle(chosen)
        for name, value in loop.tensors().items():
            value.copy_(weights[name])

    def state_dict(self) -> State:
        """All that going on needs."""
        weights, chosen = self._best or ({}, {})
        tensors = {f"{_WEIGHT}{name}": value for name, value in weights.items()}
        for name, selection in chosen.items():
            tensors |= {f"{_SELECTION}{name}:{table}": value for table, value in selection.tensors().items()}
        return tensors, {"found": self.found, **self._own()}

    def load_state(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None) -> None:
        """Go on from a `state_dict`. Raises UsageError for that of other data."""
        for key, value in self._own().items():
            if (found := (plain or {}).get(key)) != value:
                raise UsageError(f"the state to resume was judged with {key} {found}; this is {value}: start anew")
        assert plain is not None
        self.found = list(plain["found"])
        weights = {n.removeprefix(_WEIGHT): value.clone() for n, value in tensors.items() if n.startswith(_WEIGHT)}
        sites = {n.rpartition(":")[0] for n in tensors if n.startswith(_SELECTION)}
        chosen = {site.removeprefix(_SELECTION): Selection.of(tensors, f"{site}:") for site in sites}
        self._best = (weights, chosen) if weights else None

    def _own(self) -> dict[str, Any]:
        return {"keep": self.keep, "data": self.data.sha256, "task": self.data.task}


def _task(objective: Objective, sample: Batch) -> Task:
    """What plain batches are judged by: the next token if that is learnt, else what their labels are."""
    if any(isinstance(term, NextToken) for term in objective.terms):
        return "lm"
    if LABELS not in sample:
        return "none"
    return "regression" if sample[LABELS].is_floating_point() else "classification"
