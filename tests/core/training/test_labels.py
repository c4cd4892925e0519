"""Labels to numbers: what they mean, in which order classes stand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.errors import UsageError
from sparsec.training.labels import Labels, Target, Task


def read(found: list[Any], task: Task | None = None, classes: Any = (), names: Any = ()) -> Target:
    places = [f"line {i + 2}" for i in range(len(found))]
    return Labels("a.tsv, column label", places, found, tuple(names)).target(task, classes)


def refused(found: list[Any], *rest: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(found, *rest)
    assert str(caught.value).startswith("a.tsv, column label")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("found", "values", "classes"),
    [
        (["1", "0", "2"], [1, 0, 2], ("0", "1", "2")),
        ([1, 0], [1, 0], ("0", "1")),
        ([True, False], [1, 0], ("0", "1")),
        (["10", "9"], [1, 0], ("9", "10")),
        ([4, 0, 2], [2, 0, 1], ("0", "2", "4")),
        ([1, -1], [1, 0], ("-1", "1")),
        (["no", " yes ", "no"], [0, 1, 0], ("no", "yes")),
        (["b", "B", "1"], [2, 1, 0], ("1", "B", "b")),
    ],
)
def test_whole_numbers_and_text_are_classes_in_their_order(found: list[Any], values: Any, classes: Any) -> None:
    assert Target("classification", values, classes) == read(found)


@pytest.mark.parametrize("found", [["5.000", "3"], [5.0, 3.0], [5, 3.0]])
def test_other_numbers_are_scores(found: list[Any]) -> None:
    assert Target("regression", [5.0, 3.0], ()) == read(found)


def test_the_task_that_was_asked_for_is_taken() -> None:
    assert Target("classification", [1, 0], ("0", "1")) == read([1.0, 0.0], "classification")
    assert Target("regression", [1.0, 0.0], ()) == read(["1", "0"], "regression")


def test_names_of_a_data_set_are_its_classes_even_those_that_do_not_occur() -> None:
    assert Target("classification", [2, 0], ("good", "fair", "bad")) == read([2, 0], names=("good", "fair", "bad"))


@pytest.mark.parametrize(
    ("found", "names", "classes", "values"),
    [
        (["bad", "good"], (), ("good", "bad"), [1, 0]),  # by name: the order is the model's
        (["GOOD", "bad"], (), ("Good", "Bad"), [0, 1]),  # in any case
        (["a", "A"], (), ("A", "a"), [1, 0]),  # where that is clear
        ([1, 0], (), ("good", "bad"), [1, 0]),  # by number
        ([1, 1], (), ("good", "bad"), [1, 1]),  # one class will do
        ([3, 1], (), ("1", "2", "3"), [2, 0]),
        ([0, 1], ("bad", "good"), ("good", "bad"), [1, 0]),  # numbers have names: by name
        ([0, 1], ("bad", "good"), ("LABEL_0", "LABEL_1"), [0, 1]),  # unless none of the names is known
        ([0.0, 1.0], (), ("good", "bad"), [0, 1]),
    ],
)
def test_given_classes_are_met_by_name_or_else_by_number(found: Any, names: Any, classes: Any, values: Any) -> None:
    assert Target("classification", values, classes) == read(found, None, classes, names)


@given(st.lists(st.integers(0, 6) | st.sampled_from([-3, 12]), min_size=2).filter(lambda found: len(set(found)) > 1))
def test_classes_that_were_found_read_their_own_data_alike(found: list[int]) -> None:
    first = read(found)

    assert first == read(found, None, first.classes) == read([str(label) for label in found])
    assert [str(label) for label in found] == [first.classes[int(value)] for value in first.values]


@given(st.lists(st.text(st.characters(categories=["L"]), min_size=1), min_size=2, unique=True))
def test_text_classes_that_were_found_read_their_own_data_alike(found: list[str]) -> None:
    first = read(found)

    assert first == read(found, None, first.classes)
    assert found == [first.classes[int(value)] for value in first.values]


@pytest.mark.parametrize(
    ("found", "rest", "said"),
    [
        (["1", "", None, "0"], (), "line 3: found no label, as in 2 of 4 rows"),
        (["a", "-", "b"], (), "line 3: found no label, as in 1 of 3 rows"),
        ([1.5, float("nan")], (), "line 3: found no label"),
        ([1, [2]], (), "line 3: found [2], expected one number or class a row; name the right column"),
        (["1.5", "n/a", "2"], (), "line 3: found 'n/a' among scores, expected a number"),
        (["1", "many"], ("regression",), "line 3: found 'many'"),
        ([1.0, float("inf")], ("regression",), "line 3: found 'inf', expected a number"),
        ([1, 1, 1], (), "found only the label '1' in 3 rows, expected two classes at least"),
        ([1, 1], (None, (), ("a", "b")), "found only the label 'b' in 2 rows"),
        ([1.0, 1.5], ("classification",), "line 3: found 1.5, expected a class; for scores say --task regression"),
        ([-1, -1], (), "line 2: found the label -1, which hides it in test data; take a split whose labels are known"),
        ([-1.0, -1.0], (), "which hides it"),
        ([1, -1, 0], (), "line 3: found the label -1"),
        ([1, -1], (None, (), ("a", "b")), "line 3: found the label -1"),
        ([1, 2], (None, (), ("a", "b")), "line 3: found the label 2; the data set names 2 classes"),
        (["yes", "maybe"], (None, ("no", "yes")), "line 3: found the label 'maybe', expected one of the 2 classes"),
        ([1, 2], (None, ("no", "yes")), "line 3: found the label '2', expected one of the 2 classes 'no', 'yes'"),
        ([0, 1], (None, ("1", "2")), "line 2: found the label '0'"),  # no numbers of numbers
        ([0, 1], (None, ("no", "yes"), ("no", "maybe")), "line 3: found the label 'maybe'"),  # half of the names
        (list(range(1001)), (), "found 1001 different labels, expected at most 1000 classes"),
        ([f"text {i}" for i in range(1001)], (), "name the right column with --label-column"),
    ],
)
def test_what_is_no_label_is_refused(found: list[Any], rest: Any, said: str) -> None:
    assert said in refused(found, *rest)
