"""Quality is the distance to the dense original, and never hides a broken model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models import random
from torch import Tensor

from sparsec.quality import FLOOR, Quality, measure

ROUNDING = 1e-6  # fp64 sums of a few terms, rounded once more by torch's cosine


def constant(**outputs: Tensor) -> Any:
    return lambda **inputs: outputs


def test_equal_programs_are_close_to_each_other() -> None:
    found = measure(constant(y=random(3, 4)), constant(y=random(3, 4)), ({}, {}))

    assert ("y", 0.0) == (found.output, found.relative_error)
    assert pytest.approx(1.0, abs=ROUNDING) == found.cosine
    assert found.words.startswith("close to the dense original (cosine 1.000")


def test_cosine_and_error_are_means_over_vectors() -> None:
    dense, sparse = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    found = measure(constant(y=sparse), constant(y=dense), ({},))

    assert pytest.approx(0.5, abs=ROUNDING) == found.cosine
    assert pytest.approx(math.sqrt((1 + 8) / 5), abs=ROUNDING) == found.relative_error
    assert found.words.startswith("needs training")


def test_an_output_of_one_number_each_has_a_cosine_within_bounds() -> None:
    found = measure(constant(y=torch.tensor([3.0, 4.0])), constant(y=torch.tensor([3.0, 4.0])), ({},))

    assert pytest.approx(1.0, abs=ROUNDING) == found.cosine


def test_the_first_floating_point_output_is_compared() -> None:
    outputs = {"ids": torch.tensor([1]), "logits": random(2, 3), "more": random(2, 3, seed=1)}

    assert "logits" == measure(constant(**outputs), constant(**outputs), ({},)).output


def test_nan_is_never_close() -> None:
    found = measure(constant(y=torch.full((2, 3), math.nan)), constant(y=random(2, 3)), ({},))

    assert not found.cosine >= FLOOR
    assert "needs training" in found.words


def test_words_name_the_floor() -> None:
    assert f"below {FLOOR}" in Quality("y", 0.3, 0.9).words
