"""Bias models: answers from columns, and a model of word overlap that is fitted to pairs of texts."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import data_models
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec.data import Tools
from sparsec.errors import UsageError
from sparsec.training import overlap
from sparsec.training.debiasing import remark
from sparsec.training.labelled import Rows, encode_labelled, read_labelled

LOGS = [math.log(0.7), math.log(0.2), math.log(0.1)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """A file of its kind with these rows."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        cells = [[json.dumps(one) if isinstance(one, list) else str(one) for one in row.values()] for row in rows]
        path.write_text("\n".join("\t".join(line) for line in [list(rows[0]), *cells]))
    return str(path)


def rows_with(bias: Any) -> list[dict[str, Any]]:
    labels = ["no", "yes", "maybe", "yes"]
    return [{"text": f"one {i}", "label": label, "bias": bias} for i, label in enumerate(labels)]


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv"])
def test_one_column_lists_the_classes_in_their_order(name: str, tmp_path: Path) -> None:
    rows = read_labelled(written(tmp_path / name, rows_with(LOGS)), bias_source="columns")

    assert rows.bias is not None
    assert ("maybe", "no", "yes") == rows.classes
    assert [pytest.approx(LOGS)] * 4 == rows.bias.rows
    assert "column bias" == rows.bias.words


def test_a_column_for_each_class_is_met_by_name_then_by_number(tmp_path: Path) -> None:
    cells = {"bias_YES": LOGS[2], "bias_no": LOGS[1], "bias_0": LOGS[0], "bias_2": 5.0}
    data = [{"text": "one", "label": label, **cells} for label in ("no", "yes", "maybe")]
    rows = read_labelled(written(tmp_path / "x.tsv", data), bias_source="columns")

    assert rows.bias is not None
    assert [pytest.approx(LOGS)] * 3 == rows.bias.rows
    assert "columns bias_0, bias_no, bias_YES" == rows.bias.words


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ([0.7, 0.2, 0.1], "line 1: the bias model gives 0.7, 0.2, 0.1; expected finite log-probabilities, whose exp"),
        ([-1.0, -1.0, -1.0], "whose exponentials add up to 1: give log_softmax"),
        ([0.0, -math.inf, -math.inf], "expected finite log-probabilities"),
        ([math.nan, -1.0, -1.0], "expected finite log-probabilities"),
        ([800.0, -1.0, -1.0], "expected finite log-probabilities"),
        (["often", -1.0, -1.0], "the bias model gives often, -1.0, -1.0; expected finite"),
        (LOGS[:2], "the bias model gives 2 numbers (-0.356674943, -1.609437912), the labels have 3 classes"),
        ("often", "bias is 'often'; expected a list such as [-0.105, -2.303]"),
        (-1.0, "bias is '-1.0'; expected a list"),
    ],
)
def test_what_are_no_log_probabilities_is_refused(bias: Any, message: str, tmp_path: Path) -> None:
    source = written(tmp_path / "x.jsonl", rows_with(bias))
    with pytest.raises(UsageError) as caught:
        read_labelled(source, bias_source="columns")

    assert message in str(caught.value)
    assert read_labelled(source).bias is None


def test_a_sum_that_is_nearly_one_is_made_one(tmp_path: Path) -> None:
    rows = read_labelled(written(tmp_path / "x.jsonl", rows_with([one + 5e-4 for one in LOGS])), bias_source="columns")

    assert rows.bias is not None
    assert [pytest.approx(LOGS)] * 4 == rows.bias.rows


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "x.tsv has no bias model's columns; its columns are 'text', 'label': give a column bias"),
        ({"bias_no": -1}, "x.tsv has no column for the class 'yes'"),
    ],
)
def test_columns_that_are_missing_are_named(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    data = [{"text": "one", "label": label, **columns} for label in ("no", "yes")]
    with pytest.raises(UsageError) as caught:
        read_labelled(written(tmp_path / "x.tsv", data), bias_source="columns")

    assert message in str(caught.value)
    assert "--bias overlap" in str(caught.value)


def test_answers_stay_with_their_rows_whatever_their_length(tmp_path: Path) -> None:
    """One row has no text; the others are batched by length."""
    texts = ["one two three", "one", "", "two", "three two one"]
    data = [
        {"text": text, "label": i % 2, "bias": [math.log(share), math.log(1 - share)]}
        for i, text in enumerate(texts)
        for share in [(i + 1) / 10]
    ]
    program, tools = data_models.words_program(), Tools(data_models.tokenizer())
    rows = read_labelled(written(tmp_path / "x.jsonl", data), bias_source="columns")
    made = encode_labelled(rows, program, tools, length=12, size=8)

    assert [2, 2] == [len(batch["bias"]) for batch in made.batches]
    assert torch.allclose(torch.tensor([[0.2, 0.8], [0.4, 0.6]]), made.batches[0]["bias"].exp())
    assert torch.allclose(torch.tensor([[0.1, 0.9], [0.5, 0.5]]), made.batches[1]["bias"].exp())
    assert [[1, 1], [0, 0]] == [batch["labels"].tolist() for batch in made.batches]
    assert "; bias model: column bias" in made.words
    other = encode_labelled(read_labelled(str(tmp_path / "x.jsonl")), program, tools, length=12, size=8)
    assert ["bias" in batch for batch in other.batches] == [False, False]
    assert made.sha256 != other.sha256


# Overlap --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("a b c d", "b c", [1, 1, 1, 1, 0.5]),
        ("A, b. c d!", "a c", [1, 1, 0, 1, 0.5]),
        ("a b c d", "d a", [1, 1, 0, 0, 0.5]),
        ("a b", "a x a", [1 / 3, 0, 0, 0, 0.5]),
        ("a b", "", [1, 1, 1, 1, 0]),
    ],
)
def test_features_by_hand(first: str, second: str, expected: list[float]) -> None:
    words = [len(text.split()) for text in (first, second)]

    assert pytest.approx([*expected, math.log((1 + words[0]) / (1 + words[1]))]) == overlap.features(first, second)
    assert len(overlap.FEATURES) == len(overlap.features(first, second))
    assert 0 == doctest.testmod(overlap).failed


def pairs(count: int, biased: float, seed: int = 0) -> tuple[list[tuple[str, str]], list[int]]:
    """Pairs of which a share `biased` is labelled by whether the second text lies within the first, others by lot."""
    order = np.random.default_rng(seed)
    found, labels = [], []
    for _ in range(count):
        words, inside, lot = order.choice(list("abcdefghijkl"), 6), order.random() < 0.5, order.random() < 0.5
        found.append((" ".join(words), " ".join(words[1:4] if inside else order.choice(list("mnopqrst"), 3))))
        labels.append(int(inside if order.random() < biased else lot))
    return found, labels


def test_the_model_finds_a_bias_and_no_more_than_there_is() -> None:
    texts, labels = pairs(600, 0.6)
    logs = overlap.log_probabilities(texts, labels, 2)

    assert 0.75 < float((logs.argmax(1) == labels).mean()) < 0.85  # .6 + .4 / 2
    assert pytest.approx(0.8, abs=0.03) == float(np.exp(logs).max(1).mean())
    assert np.array_equal(logs, overlap.log_probabilities(texts, labels, 2))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abc"), st.integers(0, 2)), min_size=2, max_size=20))
def test_what_it_says_are_log_probabilities_whose_means_are_the_frequencies(rows: list[tuple[str, str, int]]) -> None:
    """Weights of classes alone are not shrunk, so at the optimum the mean of each class is its share."""
    labels = [label for *_, label in rows]
    found = np.exp(overlap.log_probabilities([(a, b) for a, b, _ in rows], labels, 3))

    assert np.allclose(found.sum(1), 1)
    assert np.allclose(found.mean(0), np.bincount(labels, minlength=3) / len(rows), atol=2e-3)


def read_pairs(tmp_path: Path, biased: float) -> Rows:
    texts, labels = pairs(120, biased)
    data = [{"premise": a, "hypothesis": b, "label": label} for (a, b), label in zip(texts, labels, strict=True)]
    return read_labelled(written(tmp_path / "pairs.tsv", data), bias_source="overlap")


def test_a_file_of_pairs_gets_its_own_bias_model(tmp_path: Path) -> None:
    rows = read_pairs(tmp_path, 0.6)

    assert rows.bias is not None and rows.labels is not None
    assert rows.bias.words.startswith("overlap of words, right on 0.8")
    assert len(rows.labels) == len(rows.bias.rows)


@pytest.mark.parametrize(("biased", "said"), [(1.0, "is perfect"), (0.6, None)])
def test_a_fitted_model_that_explains_everything_is_said_to_be_perfect(
    biased: float, said: str | None, tmp_path: Path
) -> None:
    rows = read_pairs(tmp_path, biased)
    assert rows.bias is not None and rows.labels is not None
    found = remark([{"labels": torch.tensor(rows.labels), "bias": torch.tensor(rows.bias.rows)}])

    assert found is None if said is None else said in str(found)


def test_a_fitted_model_of_texts_that_tell_nothing_is_said_to_be_useless(tmp_path: Path) -> None:
    data = [{"premise": "a", "hypothesis": "a", "label": i % 2} for i in range(8)]
    rows = read_labelled(written(tmp_path / "pairs.tsv", data), bias_source="overlap")
    assert rows.bias is not None

    assert "is useless" in str(remark([{"labels": torch.tensor(rows.labels), "bias": torch.tensor(rows.bias.rows)}]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "one", "label": 1}, "found no pairs of texts, so there is no overlap of words"),
        ({"input_ids": [1, 2], "label": 1}, "found no pairs of texts"),
        ({"premise": "one", "hypothesis": "two", "score": 0.5}, "the labels are scores, and a bias model says how"),
        ({"text": "one"}, "the bias of a text without labels cannot be modelled"),
    ],
)
def test_overlap_of_anything_else_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = written(tmp_path / "x.jsonl", [row, {**row, "label": 0} if "label" in row else row])
    with pytest.raises(UsageError) as caught:
        read_labelled(source, bias_source="overlap")

    assert message in str(caught.value)
