"""Losses, against formulas written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from sparsec.errors import UsageError
from sparsec.training.losses import CrossEntropy, Distillation, MeanSquare, NextToken, Objective, objective

LOGITS = {"logits": torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])}


def value(term: Any, outputs: Any, batch: Any, teacher: Any = None) -> float:
    made = Objective((term,))
    return float(made.loss(outputs, batch, teacher or {}, made.counts([batch])))


def test_cross_entropy_by_hand() -> None:
    batch = {"labels": torch.tensor([1, 0])}

    assert pytest.approx((math.log(4 / 3) + math.log(2)) / 2) == value(CrossEntropy(), LOGITS, batch)


def test_a_label_of_minus_100_does_not_count() -> None:
    assert pytest.approx(math.log(2)) == value(CrossEntropy(), LOGITS, {"labels": torch.tensor([-100, 0])})


def test_distillation_by_hand() -> None:
    """T = 2: student softmax(0, ln 3 / 2) = (1, s) / (1 + s), s = sqrt 3; teacher (0, 2 ln 9) -> (1, 9) / 10."""
    outputs = {"logits": torch.tensor([[0.0, math.log(3.0)]])}
    teacher = {"logits": torch.tensor([[0.0, 2 * math.log(9.0)]])}
    s = math.sqrt(3)
    divergence = 0.1 * math.log(0.1 * (1 + s)) + 0.9 * math.log(0.9 * (1 + s) / s)

    found = value(Distillation(temperature=2.0), outputs, {"x": torch.zeros(1, 1)}, teacher)

    assert pytest.approx(4 * divergence, rel=1e-5) == found


def test_distillation_of_hidden_states_is_a_mean_square_over_real_positions() -> None:
    outputs = {"hidden": torch.tensor([[[1.0, 2.0], [5.0, 5.0]]])}
    teacher = {"hidden": torch.tensor([[[0.0, 0.0], [9.0, 0.0]]])}
    batch = {"input_ids": torch.zeros(1, 2), "attention_mask": torch.tensor([[1, 0]])}

    assert 3 * 2.5 == value(Distillation(hidden=3.0), outputs, batch, teacher)
    assert 1.0 * (2.5 + (16 + 25) / 2) / 2 == value(Distillation(), outputs, {"x": torch.zeros(1, 2)}, teacher)


def test_a_language_model_learns_the_next_token_and_no_padding() -> None:
    logits = torch.zeros(1, 4, 5)
    logits[0, 0, 3] = math.log(4.0)
    batch = {"input_ids": torch.tensor([[1, 3, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}

    assert pytest.approx((math.log(2) + math.log(5)) / 2) == value(NextToken(), {"logits": logits}, batch)


def test_mean_square_by_hand() -> None:
    outputs, batch = {"logits": torch.tensor([[1.0], [3.0]])}, {"labels": torch.tensor([0.0, 1.0])}

    assert 2.5 == value(MeanSquare(), outputs, batch)


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_out_of_range_is_named(label: int) -> None:
    with pytest.raises(UsageError, match=rf"found the label {label}; the model has 2 classes"):
        value(CrossEntropy(), LOGITS, {"labels": torch.tensor([0, label])})


def test_labels_of_another_shape_or_type_are_refused() -> None:
    with pytest.raises(UsageError, match=r"labels are int64\[2, 1\]; with logits \[2, 2\] expected int64\[2\]"):
        value(CrossEntropy(), LOGITS, {"labels": torch.tensor([[0], [1]])})
    with pytest.raises(UsageError, match=r"labels are \(3,\), the model's output is \(2, 2\)"):
        value(MeanSquare(), LOGITS, {"labels": torch.zeros(3)})


def test_a_teacher_with_another_head_is_refused() -> None:
    with pytest.raises(UsageError, match=r"output logits is \(2, 2\), the teacher's \(2, 3\)"):
        value(Distillation(), LOGITS, {"x": torch.zeros(2, 1)}, {"logits": torch.zeros(2, 3)})


@pytest.mark.parametrize(
    ("labels", "expected"), [(torch.tensor([0, 1]), [CrossEntropy()]), (torch.zeros(2), [MeanSquare()])]
)
def test_auto_takes_the_loss_that_labels_are_made_for(labels: torch.Tensor, expected: list[Any]) -> None:
    made = objective("auto", {"x": torch.zeros(2, 1), "labels": labels}, LOGITS, 0.0, 2.0, 1.0)

    assert tuple(expected) == made.terms


def test_without_labels_and_teacher_there_is_nothing_to_learn() -> None:
    sample = {"x": torch.zeros(2, 1)}

    assert (Distillation(1.0),) == objective("auto", sample, LOGITS, 1.0, 2.0, 1.0).terms
    with pytest.raises(UsageError, match="there is nothing to learn from"):
        objective("auto", sample, LOGITS, 0.0, 2.0, 1.0)
    with pytest.raises(UsageError, match="loss cross-entropy: the batches have x; expected labels too"):
        objective("cross-entropy", sample, LOGITS, 0.0, 2.0, 1.0)
    with pytest.raises(UsageError, match="loss is 'ce'; expected one of auto, cross-entropy"):
        objective("ce", sample, LOGITS, 0.0, 2.0, 1.0)  # type: ignore[arg-type]
