"""Losses against a known bias: product of experts, example reweighting, confidence regularisation.

1. A batch has `bias`, (batch, classes): what a bias model, which sees nothing but the shortcut, gives each class, as
   log-probabilities, float. The model is not given them. They are fixed: nothing is learnt of the bias here.
2. For all three a sample with the label -100 does not count, and the sum is divided by the number of those that do.
3. Only training knows the bias: what is evaluated and compiled is the model alone.

(As in "A Win-win Deal: Towards Sparse and Robust Pre-trained Language Models", arXiv 2210.05211. Its code divides the
reweighted sum by the sum of weights; here as in the paper by the count, which with Adam is nearly the same.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsec.errors import UsageError
from sparsec.training.losses import BIAS, IGNORED, LABELS, Batch, LossTerm, Outputs, cross_entropy, main_name

_SUM_TO_ONE = 1e-3  # logarithm of the sum of a row's probabilities, as far as it may be from 0
_PERFECT = 0.99  # mean probability of the true class


@dataclass(frozen=True)
class ProductOfExperts:
    """Cross-entropy of log_softmax(z) + log p_b, normalised anew: what the bias explains leaves no gradient."""

    weight: float = 1.0
    needs_teacher: bool = False

    def count(self, batch: Batch) -> int:
        return _count(batch)

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        logits = outputs[main_name(outputs)]
        return cross_entropy(logits.float() + _bias(logits, batch), batch[LABELS])  # softmax takes what z lacks


@dataclass(frozen=True)
class Reweighted:
    """Cross-entropy times 1 - p_b(y): what the bias is sure of and right about counts least."""

    weight: float = 1.0
    needs_teacher: bool = False

    def count(self, batch: Batch) -> int:
        return _count(batch)

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        logits = outputs[main_name(outputs)]
        each = cross_entropy(logits, batch[LABELS], "none")
        return (each * (1 - _of_label(_bias(logits, batch), batch[LABELS]).exp())).sum()


@dataclass(frozen=True)
class ConfidenceRegularised:
    """Cross-entropy with p_t^(1 - b) / sum p_t^(1 - b), p_t the teacher's probabilities, b = p_b(y).

    The surer the bias is of the label, the less sure the model is to be: from the teacher's answer to an even one.
    """

    weight: float = 1.0
    needs_teacher: bool = True

    def count(self, batch: Batch) -> int:
        return _count(batch)

    def sum(self, outputs: Outputs, batch: Batch, teacher: Outputs) -> Tensor:
        name, labels = main_name(outputs), batch[LABELS]
        logits, given = outputs[name], teacher.get(name)
        if given is None or given.shape != logits.shape:
            there = "none" if given is None else tuple(given.shape)
            raise UsageError(
                f"loss confreg: the model's output {name} is {tuple(logits.shape)}, the teacher's {there}; the teacher "
                "must have the same head, and be trained on the task"
            )
        cross_entropy(logits.detach(), labels)  # for its checks of the labels
        left = 1 - _of_label(_bias(logits, batch), labels).exp()
        target = (functional.log_softmax(given.float(), -1) * left[:, None]).softmax(-1)
        each = -(target * functional.log_softmax(logits.float(), -1)).sum(-1)
        return each.masked_fill(labels == IGNORED, 0).sum()


TERMS: dict[str, Callable[[], LossTerm]] = {
    "poe": ProductOfExperts,
    "reweight": Reweighted,
    "confreg": ConfidenceRegularised,
}
"""By the name that the option `loss` gives them."""


def remark(groups: Sequence[Batch]) -> str | None:
    """In words, if the bias model of these batches is perfect or useless; None where it is neither.

    Perfect: it gives true classes .99 on average. Useless: it tells no more of them than how frequent they are.
    """
    counted = torch.cat([group[LABELS][group[LABELS] != IGNORED] for group in groups])
    found = torch.cat([_of_label(group[BIAS].float(), group[LABELS])[group[LABELS] != IGNORED] for group in groups])
    if not len(counted):
        return None
    mean = float(found.exp().mean())
    if mean >= _PERFECT:
        return (
            f"the bias model is perfect: it gives the true class {mean:.3f} on average, so hardly a sample is left to "
            "learn from; give it less to see, or take its answers on samples that it was not trained on"
        )
    shares = counted.unique(return_counts=True)[1].double() / len(counted)
    even, reached = -float((shares * shares.log()).sum()), -float(found.double().mean())
    if reached >= even - 1e-6 * max(even, 1.0):
        return (
            f"the bias model is useless: its loss on the labels is {reached:.3f}, and that of always giving how "
            f"frequent they are {even:.3f}; there is no bias that the loss could work against: look whether its "
            "columns are in the order of the classes, or train it longer"
        )
    return None


def _count(batch: Batch) -> int:
    return int((batch[LABELS] != IGNORED).sum())


def _bias(logits: Tensor, batch: Batch) -> Tensor:
    """The bias model's log-probabilities, float32 (batch, classes). Raises UsageError unless they are such."""
    there = batch.get(BIAS)
    if there is None:
        raise UsageError(
            f"the loss needs a bias model's answers: the batches have {', '.join(batch)}; expected {BIAS!r} too, its "
            f"log-probabilities {list(logits.shape)}, or another loss"
        )
    if there.shape != logits.shape or logits.dim() != 2 or not there.is_floating_point():
        raise UsageError(
            f"{BIAS} is {str(there.dtype).removeprefix('torch.')}{list(there.shape)}; with logits {list(logits.shape)} "
            "expected floating-point log-probabilities (batch, classes), one row for each sample"
        )
    found = there.float()
    off = float(found.logsumexp(-1).abs().max()) if found.numel() else 0.0
    if not off <= _SUM_TO_ONE or not bool(found.isfinite().all()):  # NaN is not <= either
        why = f"a row's probabilities add up to exp({off:.3g})" if math.isfinite(off) and off else "found -inf or NaN"
        raise UsageError(
            f"{BIAS}: {why}; expected finite log-probabilities, whose exponentials add up to 1: give "
            "log_softmax(logits), or the logarithm of probabilities none of which is 0"
        )
    return found


def _of_label(bias: Tensor, labels: Tensor) -> Tensor:
    """The column of each sample's label, (batch); of the first class where the label does not count."""
    return bias.gather(1, labels.masked_fill(labels == IGNORED, 0)[:, None])[:, 0]
