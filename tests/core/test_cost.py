"""Token ranges, and predicted seconds turned into ratios and break-even points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsec.cost import DENSE, MOST_TOKENS, TokenRange, break_even, slow, speed
from sparsec.errors import UsageError
from sparsec.pattern import NM, Pattern

SHAPE, PATTERN = (1, 8, 8), NM(2, 4)


def until(tokens: int):
    """A cost by which sparse is twice as fast as dense up to `tokens`, and half as fast beyond."""

    def cost(shape: tuple[int, int, int], pattern: Pattern, count: int, values: str) -> float:
        return 1.0 if pattern == DENSE else 0.5 if count <= tokens else 2.0

    return cost


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_range_reads_what_it_prints_and_counts_from_end_to_end(low: int, more: int) -> None:
    one = TokenRange(low, low + more)

    assert one == TokenRange.parse(str(one))
    assert (low, low + more) == (one.counts[0], one.counts[-1])
    assert sorted(set(one.counts)) == list(one.counts)
    assert all(count & (count - 1) == 0 for count in one.counts[1:-1])


@pytest.mark.parametrize("text", ["", "0", "5-2", "a", "1-", "-3", "1,2", "1 - 5"])
def test_other_text_is_no_range(text: str) -> None:
    with pytest.raises(UsageError, match="expected LOW-HIGH such as 1-512"):
        TokenRange.parse(text)


def test_speed_is_the_geometric_mean_of_the_ratios() -> None:
    assert 2.0 == speed(until(64), SHAPE, PATTERN, (1, 64))
    assert 1.0 == pytest.approx(speed(until(64), SHAPE, PATTERN, (64, 128)))
    assert 0.5 == speed(until(64), SHAPE, PATTERN, (128,))


@pytest.mark.parametrize(("last", "expected"), [(0, 0), (1, 1), (100, 64), (MOST_TOKENS, MOST_TOKENS)])
def test_break_even_is_the_most_tokens_that_are_not_slower(last: int, expected: int) -> None:
    assert expected == break_even(until(last), SHAPE, PATTERN)


def test_break_even_counts_what_else_a_kernel_does() -> None:
    assert MOST_TOKENS == break_even(until(64), SHAPE, PATTERN, factor=2.0)
    assert 0 == break_even(until(64), SHAPE, PATTERN, factor=0.4)


def test_a_reason_says_ratio_range_and_what_it_rests_on() -> None:
    assert "predicted 0.93x at 1-512 tokens on this machine (measured kernels)" == slow(
        0.931, TokenRange(1, 512), "measured"
    )
    assert "not measured" in slow(0.5, TokenRange(1, 1), "model")
