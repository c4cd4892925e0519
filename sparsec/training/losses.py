"""What training minimises: terms over a graph's outputs, each a sum and a count that the batch alone decides.

Because counts are known beforehand, a step's gradient is that of its samples, however they are cut into batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from sparsec.errors import UsageError

LABELS, LOGITS, IGNORED = "labels", "logits", -100
BIAS = "bias"
"""Log-probabilities of a bias model, (batch, classes); see `debiasing`."""
BESIDE = (LABELS, BIAS)
"""What a batch may have beside the model's inputs."""
Batch = Mapping[str, Tensor]
Outputs = Mapping[str, Tensor]
Loss = Literal["auto", "cross-entropy", "mse", "lm", "poe", "reweight", "confreg", "none"]


class LossTerm(Protocol):
    """One term of the loss."""

    @property
    def weight(self) -> float:
        """What the term is multiplied by."""

    @property
    def needs_teacher(self) -> bool:
        """Whether it reads the teacher's outputs."""

    def count(self, batch: Batch) -> int:
        """Over how many things the sum runs."""

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        """The sum. `teacher`: its outputs, empty where no term needs them."""


@dataclass(frozen=True)
class CrossEntropy:
    """Of logits (..., classes) with integer labels (...); a label of -100 does not count."""

    weight: float = 1.0
    needs_teacher: bool = False

    def count(self, batch: Batch) -> int:
        return int((batch[LABELS] != IGNORED).sum())

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        return cross_entropy(main_output(outputs), batch[LABELS])


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of logits (batch, length, vocabulary) with the next label, -100 not counted.

    Without labels they are the input_ids, where attention_mask is not 0.
    """

    weight: float = 1.0
    needs_teacher: bool = False

    def count(self, batch: Batch) -> int:
        return int((next_labels(batch) != IGNORED).sum())

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        return cross_entropy(main_output(outputs)[:, :-1], next_labels(batch))


@dataclass(frozen=True)
class MeanSquare:
    """(output - label)^2; an output with one column more than the labels, of size 1, is taken without it."""

    weight: float = 1.0
    needs_teacher: bool = False

    def count(self, batch: Batch) -> int:
        return batch[LABELS].numel()

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        found = scores_of(outputs, batch[LABELS])
        return (found - batch[LABELS].to(found.dtype)).square().sum()


@dataclass(frozen=True)
class Distillation:
    """For each sample, T^2 KL(teacher || student) of logits, and `hidden` times the mean square of other outputs.

    (Hinton et al., arXiv 1503.02531.) Means over positions, those with attention_mask 0 left out. Which output is
    logits: the one of that name, or the one that a cross-entropy reads.
    """

    weight: float = 1.0
    temperature: float = 2.0
    hidden: float = 1.0
    logits: str = LOGITS
    needs_teacher: bool = True

    def count(self, batch: Batch) -> int:
        return len(next(iter(batch.values())))

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        total, used = torch.zeros(()), False
        for name, found in outputs.items():
            if not found.is_floating_point() or (name != self.logits and not self.hidden):
                continue
            given = teacher.get(name)
            if given is None or given.shape != found.shape:
                there = "none" if given is None else tuple(given.shape)
                raise UsageError(
                    f"distillation: the model's output {name} is {tuple(found.shape)}, the teacher's {there}; the "
                    "teacher must have the same head and vocabulary"
                )
            each = self._divergence(found, given) if name == self.logits else (found - given).square().mean(-1)
            scale = self.temperature**2 if name == self.logits else self.hidden
            total, used = total + scale * _by_sample(each, batch).sum(), True
        if not used:
            raise UsageError(
                f"distillation: of the outputs {', '.join(outputs)} none is {self.logits}, and hidden is 0"
            )
        return total

    def _divergence(self, found: Tensor, given: Tensor) -> Tensor:
        student, teacher = (functional.log_softmax(x.float() / self.temperature, -1) for x in (found, given))
        return functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


_TERMS: dict[str, Callable[[], LossTerm]] = {"cross-entropy": CrossEntropy, "mse": MeanSquare, "lm": NextToken}


@dataclass(frozen=True)
class Objective:
    """A weighted sum of terms."""

    terms: tuple[LossTerm, ...]

    @property
    def needs_teacher(self) -> bool:
        """Whether some term reads the teacher's outputs."""
        return any(term.needs_teacher for term in self.terms)

    def counts(self, batches: Sequence[Batch]) -> tuple[int, ...]:
        """What each term's sum is divided by in a step on these batches; at least 1."""
        return tuple(max(1, sum(term.count(batch) for batch in batches)) for term in self.terms)

    def loss(self, outputs: Outputs, batch: Batch, teacher: Outputs, counts: tuple[int, ...]) -> Tensor:
        """This batch's part of the step's loss."""
        parts = [t.weight * t.sum(outputs, batch, teacher) / n for t, n in zip(self.terms, counts, strict=True)]
        return torch.stack(parts).sum()


def objective(
    loss: Loss, sample: Batch, outputs: Outputs, distill: float, temperature: float, hidden: float
) -> Objective:
    """The terms that options name. `sample`: a batch; `outputs`: what the model gives.

    auto: cross-entropy for integer labels, mse for others, none without labels. Raises UsageError when nothing is left.
    """
    from sparsec.training.debiasing import TERMS  # terms of their own file, which is built on this one

    if loss not in get_args(Loss):
        raise UsageError(f"loss is {loss!r}; expected one of {', '.join(get_args(Loss))}")
    labels = sample.get(LABELS)
    if loss == "auto":
        loss = "none" if labels is None else "mse" if labels.is_floating_point() else "cross-entropy"
    if labels is None and loss not in ("lm", "none"):
        raise UsageError(f"loss {loss}: the batches have {', '.join(sample)}; expected labels too")
    terms: list[LossTerm] = []
    if loss != "none":
        terms.append((_TERMS | TERMS)[loss]())
    if distill:
        name = LOGITS if loss == "none" else "" if loss == "mse" else main_name(outputs)
        terms.append(Distillation(distill, temperature, hidden, name))
    if not terms:
        raise UsageError(
            "there is nothing to learn from: the batches have no labels and distill is 0; add labels to the batches, "
            "or learn from the dense model with distill=1"
        )
    return Objective(tuple(terms))


def main_name(outputs: Outputs) -> str:
    """The output that task losses read: logits, or the first of floating-point numbers."""
    if LOGITS in outputs:
        return LOGITS
    name = next((key for key, value in outputs.items() if value.is_floating_point()), None)
    if name is None:
        raise UsageError(f"the model's outputs {', '.join(outputs)} are no floating-point numbers; none can be trained")
    return name


def main_output(outputs: Outputs) -> Tensor:
    """See `main_name`."""
    return outputs[main_name(outputs)]


def next_labels(batch: Batch) -> Tensor:
    """What a language model should say after each token but the last: (batch, length - 1)."""
    labels = batch.get(LABELS)
    if labels is None:
        if "input_ids" not in batch:
            raise UsageError(f"loss lm: found {', '.join(batch)}; expected labels or input_ids")
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    return labels[:, 1:]


def scores_of(outputs: Outputs, labels: Tensor) -> Tensor:
    """The main output in the shape of the labels."""
    found = main_output(outputs)
    if found.dim() == labels.dim() + 1 and found.shape[-1] == 1:
        found = found.squeeze(-1)
    if found.shape != labels.shape:
        raise UsageError(f"loss mse: labels are {tuple(labels.shape)}, the model's output is {tuple(found.shape)}")
    return found


def cross_entropy(logits: Tensor, labels: Tensor, reduction: Literal["sum", "none"] = "sum") -> Tensor:
    """Added up, or (none) of every label, flattened, 0 where it does not count. Raises UsageError for other shapes."""
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise UsageError(
            f"cross-entropy: labels are {str(labels.dtype).removeprefix('torch.')}{list(labels.shape)}; with logits "
            f"{list(logits.shape)} expected int64{list(logits.shape[:-1])}"
        )
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[-1]:
        wrong = counted.min() if counted.min() < 0 else counted.max()
        raise UsageError(
            f"found the label {int(wrong)}; the model has {logits.shape[-1]} classes, so labels are from 0 to "
            f"{logits.shape[-1] - 1}, or {IGNORED} to leave one out"
        )
    flat = logits.float().flatten(0, -2)
    return functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def _by_sample(each: Tensor, batch: Batch) -> Tensor:
    """Mean over positions of (batch, ...), where attention_mask is not 0 if it fits: (batch)."""
    mask = batch.get("attention_mask")
    if each.dim() == 1:
        return each
    if mask is not None and mask.shape == each.shape:
        kept = mask.to(each.dtype)
        return (each * kept).sum(1) / kept.sum(1).clamp(min=1)
    return each.flatten(1).mean(1)
