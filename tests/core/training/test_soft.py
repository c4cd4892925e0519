"""S-STE's soft threshold, by hand and by its laws."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from training_models import engine

from sparsec.errors import PatternError
from sparsec.pattern import NM, VNM, Pattern, Unstructured
from sparsec.training.parts import Method
from sparsec.training.soft import EveryStep, SoftThreshold, soft_threshold

ROUNDING = 1e-6  # of a few float32 operations on numbers near 10
PATTERNS = ["2:4", "1:4", "2:3", "3:2:5", "2:2:8", "4:2:4", "unstructured:0.6"]


def soft(weight: list[list[float]], pattern: str) -> torch.Tensor:
    read = Pattern.parse(pattern)
    assert isinstance(read, (NM, VNM, Unstructured))
    return soft_threshold(torch.tensor([weight]), read)[0]


def test_two_of_four_by_hand() -> None:
    """t is the third largest: 2 in the first group, 5 in the second; a tail of two loses nothing."""
    found = soft([[4.0, -3.0, 2.0, 1.0, 5.0, 5.0, -7.0, 0.0, 3.0, -1.0]], "2:4")

    assert [[2.0, -1.0, 0.0, 0.0, 0.0, 0.0, -2.0, 0.0, 3.0, -1.0]] == found.tolist()


def test_one_threshold_a_matrix_where_there_are_no_groups() -> None:
    assert [[0.0, -1.0], [2.0, 0.0]] == soft([[1.0, -3.0], [4.0, 2.0]], "unstructured:0.5").tolist()


def test_columns_are_shrunk_before_rows_by_hand() -> None:
    """Columns are 5, 10, 5, 10, 2 long: they are shrunk by 2, to .6, .8, .6, .8, 0 of them; then rows by the third."""
    found = soft([[3.0, 0.0, 5.0, 8.0, 0.0], [4.0, 10.0, 0.0, 6.0, 2.0]], "2:2:5")
    expected = torch.tensor([[0.0, 0.0, 1.2, 4.6, 0.0], [0.0, 5.6, 0.0, 2.4, 0.0]])

    assert torch.allclose(expected, found, atol=10 * ROUNDING)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(PATTERNS))
def test_what_is_left_follows_the_pattern(seed: int, pattern: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, cols = (int(torch.randint(1, 12, (), generator=generator)) for _ in range(2))
    weight = torch.randn(rows, cols + 3, generator=generator).mul(3).round()  # with many ties
    found = soft(weight.tolist(), pattern)

    assert 0 == Pattern.parse(pattern).violations(found[None]).count
    assert bool((found.abs() <= weight.abs()).all())
    assert bool((found * weight >= 0).all())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nothing_jumps_along_a_line_between_two_weights(pattern: str) -> None:
    """Where masks change, a hard threshold would move weights of size 1 at once."""
    generator = torch.Generator().manual_seed(1)
    one, other = torch.randn(2, 6, 10, generator=generator)
    steps = 400
    path = [soft((one + (other - one) * i / steps).tolist(), pattern) for i in range(steps + 1)]
    largest = max(float((a - b).abs().max()) for a, b in itertools.pairwise(path))

    assert {bool(torch.equal(path[0] != 0, path[-1] != 0))} == {False}
    assert largest < 20 * float((other - one).abs().max()) / steps


def test_the_model_sees_shrunk_weights_and_the_optimizer_those_behind_by_hand() -> None:
    """S = [2, -1, 0, 0]; beta = (4 * 2 + 3 * 1) / (4 + 1) = 2.2, and stays."""
    method = Method(EveryStep(), SoftThreshold())
    made, parameter = engine([[4.0, -3.0, 2.0, 1.0]], "2:4", method)
    made.begin(3, 3)
    assert torch.allclose(torch.tensor([[4.4, -2.2, 0.0, 0.0]]), parameter.detach(), atol=ROUNDING)

    parameter.grad = torch.tensor([[1.0, 0.0, -2.0, 0.0]])
    made.pre_step()
    assert [[4.0, -3.0, 2.0, 1.0]] == parameter.tolist()
    with torch.no_grad():
        parameter.sub_(parameter.grad)  # the optimizer: [3, -3, 4, 1]
    made.post_step()
    assert torch.allclose(torch.tensor([[0.0, 0.0, 2.2, 0.0]]), parameter.detach(), atol=ROUNDING)  # 3 ties with 3
    assert [[3.0, -3.0, 4.0, 1.0]] == made.sites[0].tensors["dense"].tolist()
    assert [1, 0.75] == made.curves["changed"][0]


def test_patterns_whose_groups_are_chosen_are_refused() -> None:
    for pattern in ("2:2:4@strip", "2:2:5+2:4"):
        with pytest.raises(PatternError, match=r"weight: a soft threshold is defined for .* whose groups are chosen"):
            engine([[1.0] * 10] * 2, pattern, Method(EveryStep(), SoftThreshold()))
