"""How good a model is on labelled data: accuracy, F1, MCC, correlations, perplexity.

1. Every figure is one of all samples together, from exact counts or exact sums: how they are cut into batches, and in
   which order they come, changes no bit of it.
2. A label of -100 does not count.
3. Where a figure is not defined (a constant has no correlation) it is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sparsec.errors import TrainingError, UsageError
from sparsec.training.labels import Task
from sparsec.training.losses import IGNORED, LABELS, cross_entropy, main_output, next_labels, scores_of

_SMALLER = ("loss", "perplexity")
_METRICS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "mcc"),
    "regression": ("spearman", "pearson"),
    "lm": ("perplexity",),
    "none": (),
}


def metrics_for(task: Task) -> tuple[str, ...]:
    """Names of what is measured for a task, the main one first."""
    return _METRICS[task]


def main_metric(task: Task) -> str:
    """What says which of two models is better. Raises UsageError for the task none, which has no labels."""
    if not _METRICS[task]:
        raise UsageError(f"the task {task} has no labels to judge by; name data with labels, or another task")
    return _METRICS[task][0]


def bigger_is_better(name: str) -> bool:
    """Whether a larger value of this metric is the better one."""
    return name not in _SMALLER


def evaluate(
    run: Callable[..., Mapping[str, Tensor]], batches: Iterable[Mapping[str, Tensor]], task: Task
) -> dict[str, float]:
    """The metrics of a task, then `loss` (mean cross-entropy or square) and `samples`, by name.

    `run` takes inputs by name and gives outputs by name, in eval mode. Raises TrainingError for NaN.
    """
    main_metric(task)
    tally, samples = _TALLIES[task](), 0
    with torch.no_grad():
        for i, batch in enumerate(batches):
            if task != "lm" and LABELS not in batch:
                raise UsageError(f"batch {i} has {', '.join(batch)}; expected {LABELS} too, to judge {task} by")
            losses = tally.add(run(**{name: value for name, value in batch.items() if name != LABELS}), batch)
            if losses.isnan().any():
                raise TrainingError(f"the model's output is NaN in batch {i}; look for NaN in its weights and inputs")
            samples += len(next(iter(batch.values())))
    if not tally.count:
        raise UsageError(f"found no label in {samples} samples that counts; give data to judge {task} by")
    return {**tally.figures(), "samples": float(samples)}


class _Tally(Protocol):
    """What was seen so far."""

    count: int

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        """Take in a batch. Returns the loss of each label."""

    def figures(self) -> dict[str, float]:
        """The metrics and the loss."""


@dataclass
class _Classes:
    """Of logits (..., classes) and labels (...)."""

    count: int = 0
    losses: list[Tensor] = field(default_factory=list)
    table: Tensor | int = 0
    """(label, predicted class): how often."""

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        logits, labels = main_output(outputs), batch[LABELS].flatten()
        losses = cross_entropy(logits, batch[LABELS], "none").cpu()
        counted, classes = labels != IGNORED, logits.shape[-1]
        predicted = logits.flatten(0, -2).argmax(-1)[counted]
        pairs = (labels[counted] * classes + predicted).cpu()
        self.table = self.table + torch.bincount(pairs, minlength=classes**2).view(classes, classes)
        self.count += len(pairs)
        self.losses.append(losses)
        return losses

    def figures(self) -> dict[str, float]:
        assert isinstance(self.table, Tensor)
        table: list[list[int]] = self.table.tolist()
        right = sum(row[i] for i, row in enumerate(table))
        made = {"accuracy": right / self.count, "f1": _f1(table), "mcc": _mcc(table)}
        return made | {"loss": _sum(self.losses) / self.count}


@dataclass
class _Scores:
    """Of outputs (...) or (..., 1) and labels (...)."""

    count: int = 0
    found: list[float] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        found, labels = scores_of(outputs, batch[LABELS]).flatten().double(), batch[LABELS].flatten().double()
        self.found += found.tolist()
        self.labels += labels.tolist()
        self.count += len(labels)
        return (found - labels).square()

    def figures(self) -> dict[str, float]:
        from scipy.stats import rankdata

        loss = math.fsum((a - b) ** 2 for a, b in zip(self.found, self.labels, strict=True)) / self.count
        ranks = [rankdata(values).tolist() for values in (self.found, self.labels)]
        return {"spearman": _pearson(*ranks), "pearson": _pearson(self.found, self.labels), "loss": loss}


@dataclass
class _Tokens:
    """Of logits (batch, length, vocabulary) and the labels, or input ids, that come next."""

    count: int = 0
    losses: list[Tensor] = field(default_factory=list)

    def add(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        labels = next_labels(batch)
        losses = cross_entropy(main_output(outputs)[:, :-1], labels, "none").cpu()
        self.count += int((labels != IGNORED).sum())
        self.losses.append(losses)
        return losses

    def figures(self) -> dict[str, float]:
        loss = _sum(self.losses) / self.count
        return {"perplexity": math.exp(loss) if loss < _LARGEST else math.inf, "loss": loss}


_TALLIES: Mapping[Task, Callable[[], _Tally]] = {"classification": _Classes, "regression": _Scores, "lm": _Tokens}
_LARGEST = 709.0  # of which exp is a float


def _sum(parts: Sequence[Tensor]) -> float:
    return math.fsum(value for part in parts for value in part.tolist())  # rule 1: fsum is exact


def _f1(table: Sequence[Sequence[int]]) -> float:
    """2 tp / (2 tp + fp + fn) of class 1 where there are two; else the mean over the classes that occur."""
    size = range(len(table))
    totals = {k: sum(table[k]) + sum(row[k] for row in table) for k in size}
    if len(table) == 2:
        return 2 * table[1][1] / totals[1] if totals[1] else 0.0
    seen = [2 * table[k][k] / totals[k] for k in size if totals[k]]
    return math.fsum(seen) / len(seen)


def _mcc(table: Sequence[Sequence[int]]) -> float:
    """Matthews correlation for any number of classes: (c s - p t) / sqrt((s^2 - p p) (s^2 - t t)).

    s labels, c of them right; t, p: how often each class is a label, is predicted. (Gorodkin 2004.)
    """
    labels, predicted = [sum(row) for row in table], [sum(row[k] for row in table) for k in range(len(table))]
    right, count = sum(row[k] for k, row in enumerate(table)), sum(labels)
    spread = [count**2 - sum(n * n for n in totals) for totals in (labels, predicted)]
    if not all(spread):
        return 0.0  # rule 3
    both = sum(a * b for a, b in zip(labels, predicted, strict=True))
    return (right * count - both) / math.sqrt(spread[0] * spread[1])


def _pearson(found: Sequence[float], labels: Sequence[float]) -> float:
    centred = [[one - math.fsum(values) / len(values) for one in values] for values in (found, labels)]
    norms = [math.sqrt(math.fsum(one * one for one in values)) for values in centred]
    if not all(norms) or min(found) == max(found) or min(labels) == max(labels):
        return 0.0  # rule 3
    return math.fsum(a * b for a, b in zip(*centred, strict=True)) / (norms[0] * norms[1])
