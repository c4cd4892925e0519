"""Sizes that an engine is built for."""

from __future__ import annotations

import pytest
import torch
from models import Encoder, made, random
from torch import Tensor, nn

from sparsec.backends.tensorrt.profiles import LARGEST, Range, misfit, ranges, read, shapes
from sparsec.errors import RecipeError
from sparsec.program import Program
from sparsec.tracing import trace


@pytest.fixture(scope="module")
def program() -> Program:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    return trace(made(Encoder), [tokens], {"tokens": {0: "batch", 1: "length"}}, limits={"length": 16})


def test_sizes_are_read_with_spaces_or_commas() -> None:
    expected = {"batch": Range(1, 8, 32), "length": Range(128, 128, 128)}

    assert expected == read("batch=1:8:32 length=128") == read(" batch=1:8:32,length=128 ")
    assert {} == read("")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("batch=8:4:32", "does not ascend"),
        ("batch=1:8:4", "does not ascend"),
        ("batch=0:1:2", "does not ascend"),
        ("batch=1:2", "cannot read 'batch=1:2'"),
        ("batch", "cannot read 'batch'"),
        ("batch=-1:2:3", "cannot read"),
        ("batch=1 batch=2", "batch is given twice"),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_a_build(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        read(text)


def test_by_default_sizes_go_from_one_over_the_example_to_the_limit(program: Program) -> None:
    assert {"batch": Range(1, 2, LARGEST), "length": Range(1, 3, 16)} == ranges({}, program)


def test_an_asked_size_replaces_its_default_only(program: Program) -> None:
    assert {"batch": Range(4, 4, 8), "length": Range(1, 3, 16)} == ranges(read("batch=4:4:8"), program)


def test_sizes_that_the_model_does_not_take_are_named(program: Program) -> None:
    assert "sizes names 'width'; the model's dynamic sizes are batch, length" == misfit(read("width=3"), program)
    assert "length of 1 to 32, and the model takes 1 to 16" in (misfit(read("length=1:8:32"), program) or "")
    assert misfit(read("batch=1:8:500 length=16"), program) is None


def test_shapes_follow_from_the_inputs(program: Program) -> None:
    assert {"tokens": ([1, 1], [2, 3], [LARGEST, 16])} == shapes(ranges({}, program), program)


def test_an_input_of_fixed_sizes_needs_no_profile() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    fixed = trace(made(Fixed), [random(2, 4)], {})

    assert {} == shapes(ranges({}, fixed), fixed)
