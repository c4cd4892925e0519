"""Metrics, against values worked out by hand and their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import TrainingError, UsageError
from sparsec.training.labels import Task
from sparsec.training.metrics import bigger_is_better, evaluate, main_metric, metrics_for


def echo(x: Tensor) -> dict[str, Tensor]:
    """A model that gives its input."""
    return {"logits": x}


def judged(task: Task, x: Tensor, labels: Tensor, size: int | None = None) -> dict[str, float]:
    size = size or len(x)
    pairs = zip(x.split(size), labels.split(size), strict=True)
    return evaluate(echo, [{"x": inputs, "labels": answers} for inputs, answers in pairs], task)


def classified(predicted: list[int], labels: list[int], classes: int) -> dict[str, float]:
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), classes).float()
    return judged("classification", logits, torch.tensor(labels))


def test_two_classes_by_hand() -> None:
    """tp 2, fp 1, fn 1, tn 3."""
    found = classified([1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0], 2)

    assert 5 / 7 == found["accuracy"]
    assert 4 / 6 == found["f1"]
    assert pytest.approx((2 * 3 - 1) / math.sqrt(3 * 3 * 4 * 4)) == found["mcc"]
    assert pytest.approx((5 * math.log(1 + 1 / math.e) + 2 * math.log(1 + math.e)) / 7) == found["loss"]
    assert 7 == found["samples"]


def test_more_classes_by_hand() -> None:
    """Class 3 never occurs, so it has no part in the mean. F1: 0: 2/3, 1: 2/3, 2: 1."""
    found = classified([0, 1, 1, 2], [0, 0, 1, 2], 4)

    assert 3 / 4 == found["accuracy"]
    assert pytest.approx(7 / 9) == found["f1"]
    assert pytest.approx((3 * 4 - (2 * 1 + 1 * 2 + 1)) / math.sqrt((16 - 6) * (16 - 6))) == found["mcc"]


PAIRS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30)


@given(PAIRS)
def test_two_classes_by_definition(pairs: list[tuple[int, int]]) -> None:
    found = classified([one for one, _ in pairs], [label for _, label in pairs], 2)
    tp, tn, fp, fn = (pairs.count(cell) for cell in ((1, 1), (0, 0), (1, 0), (0, 1)))
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    spread = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)

    assert (tp + tn) / len(pairs) == found["accuracy"]
    assert pytest.approx(2 * precision * recall / ((precision + recall) or 1)) == found["f1"]
    assert pytest.approx((tp * tn - fp * fn) / math.sqrt(spread) if spread else 0) == found["mcc"]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=30))
def test_mcc_of_more_classes_is_the_correlation_of_their_indicators(pairs: list[tuple[int, int]]) -> None:
    """Gorodkin's definition: covariances of one-hot columns, summed over the classes."""
    predicted, labels = (torch.nn.functional.one_hot(torch.tensor(one), 5).double() for one in zip(*pairs, strict=True))
    x, y = predicted - predicted.mean(0), labels - labels.mean(0)
    spread = float((x * x).sum() * (y * y).sum())

    found = classified([one for one, _ in pairs], [label for _, label in pairs], 5)

    assert pytest.approx(float((x * y).sum()) / math.sqrt(spread) if spread > 1e-9 else 0, abs=1e-9) == found["mcc"]


@settings(max_examples=20)
@given(st.integers(1, 23), st.permutations(range(23)))
@pytest.mark.parametrize("task", ["classification", "regression", "lm"])
def test_cutting_and_order_change_no_bit(task: Task, size: int, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"classification": ((23, 3), (23,)), "regression": ((23, 1), (23,)), "lm": ((23, 5, 7), (23, 5))}
    x = torch.randn(shapes[task][0], generator=generator) * 4
    labels = torch.randint(0, 3, shapes[task][1], generator=generator)
    if task == "regression":
        labels = labels + torch.rand(23, generator=generator)

    assert judged(task, x, labels) == judged(task, x[order], labels[order], size)


def test_a_label_of_minus_100_does_not_count() -> None:
    x = torch.tensor([[0.0, 1.0], [9.0, 0.0], [0.0, 1.0]])

    found = judged("classification", x, torch.tensor([1, -100, 1]))

    assert 1 == found["accuracy"]
    assert pytest.approx(math.log(1 + 1 / math.e)) == found["loss"]
    assert 3 == found["samples"]


def test_labels_of_every_token_are_judged_one_by_one() -> None:
    x = torch.tensor([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])

    assert 3 / 4 == judged("classification", x, torch.tensor([[1, 0], [0, 1]]))["accuracy"]


def test_scores_by_hand() -> None:
    """Ranks 1 2 3 4 and 1 2.5 2.5 4, from their means: -1.5 -0.5 0.5 1.5 and -1.5 0 0 1.5."""
    found = judged("regression", torch.tensor([[1.0], [2.0], [3.0], [10.0]]), torch.tensor([0.0, 2.0, 2.0, 4.0]))

    assert pytest.approx(4.5 / math.sqrt(5 * 4.5)) == found["spearman"]
    assert pytest.approx(18 / math.sqrt(50 * 8)) == found["pearson"]
    assert (1 + 0 + 1 + 36) / 4 == found["loss"]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    from scipy.stats import pearsonr, spearmanr

    x, y = zip(*pairs, strict=True)
    constant = min(x) == max(x) or min(y) == max(y)

    found = judged("regression", torch.tensor(x).float(), torch.tensor(y).float())

    assert pytest.approx(0 if constant else pearsonr(x, y).statistic, abs=1e-12) == found["pearson"]
    assert pytest.approx(0 if constant else spearmanr(x, y).statistic, abs=1e-12) == found["spearman"]


def test_what_is_constant_has_no_correlation() -> None:
    found = judged("regression", torch.full((3, 1), 0.1), torch.tensor([1.0, 2.0, 3.0]))

    assert (0, 0) == (found["pearson"], found["spearman"])
    assert 0 == classified([1, 1, 1], [0, 1, 1], 2)["mcc"]
    assert 0 == classified([0, 0], [0, 0], 2)["f1"]


def test_perplexity_is_of_the_next_token() -> None:
    """After token 0: label 1 with probability 1/4; after token 1 the label does not count; the last says nothing."""
    x = torch.zeros(1, 3, 4)
    x[0, 2] = torch.tensor([50.0, 0.0, 0.0, 0.0])

    found = judged("lm", x, torch.tensor([[3, 1, -100]]))

    assert {"perplexity": pytest.approx(4), "loss": pytest.approx(math.log(4)), "samples": 1} == found


def test_a_language_model_needs_no_labels() -> None:
    ids = torch.tensor([[0, 1, 1]])

    found = evaluate(lambda input_ids: {"logits": torch.zeros(1, 3, 5)}, [{"input_ids": ids}], "lm")

    assert pytest.approx(5) == found["perplexity"]


def test_a_hopeless_perplexity_is_infinite() -> None:
    x = torch.zeros(1, 2, 2)
    x[0, 0, 0] = 1e4

    assert math.inf == judged("lm", x, torch.tensor([[0, 1]]))["perplexity"]


def test_the_main_metric_is_the_first_one() -> None:
    for task in ("classification", "regression", "lm"):
        made: Any = judged(task, *{
            "classification": (torch.eye(2), torch.tensor([0, 1])),
            "regression": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
            "lm": (torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.int64)),
        }[task])  # fmt: skip
        assert [*metrics_for(task), "loss", "samples"] == list(made)
        assert main_metric(task) == metrics_for(task)[0]
    assert () == metrics_for("none")


def test_which_way_is_better() -> None:
    assert all(map(bigger_is_better, ["accuracy", "f1", "mcc", "spearman", "pearson"]))
    assert not any(map(bigger_is_better, ["loss", "perplexity"]))


def test_no_gradient_is_recorded() -> None:
    weight = torch.ones(2, requires_grad=True)
    seen = []

    def run(x: Tensor) -> dict[str, Tensor]:
        seen.append(x * weight)
        return {"logits": seen[0]}

    evaluate(run, [{"x": torch.eye(2), "labels": torch.tensor([0, 1])}], "classification")

    assert not seen[0].requires_grad


@pytest.mark.parametrize(
    ("task", "batches", "said"),
    [
        ("none", [], "the task none has no labels to judge by"),
        ("classification", [], "found no label in 0 samples that counts"),
        ("classification", [{"x": torch.eye(2), "labels": torch.tensor([-100, -100])}], "found no label in 2 samples"),
        ("classification", [{"x": torch.eye(2)}], "batch 0 has x; expected labels too, to judge classification by"),
        ("classification", [{"x": torch.eye(2), "labels": torch.tensor([0, 2])}], "found the label 2"),
        ("regression", [{"x": torch.eye(2), "labels": torch.ones(2)}], "the model's output is (2, 2)"),
    ],
)
def test_what_cannot_be_judged(task: Task, batches: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        evaluate(echo, batches, task)
    assert said in str(caught.value)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_nan_is_an_error_and_names_the_batch(task: Task) -> None:
    labels = torch.tensor([0, 1]) if task == "classification" else torch.ones(2)
    good, bad = torch.ones(2, 2 if task == "classification" else 1), torch.full((2, 1), math.nan)
    batches = [{"x": x, "labels": labels} for x in (good, bad.expand_as(good))]

    with pytest.raises(TrainingError, match="NaN in batch 1"):
        evaluate(echo, batches, task)
