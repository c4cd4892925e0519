"""Second moments of inputs, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from core.oneshot.problems import inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import SparsecError
from sparsec.oneshot import gram, moments
from sparsec.oneshot.moments import Collector, Moments, Need

FP32_PRODUCTS = 2e-6  # relative to the largest entry: fp32 sums of a few hundred products
X, X0 = inputs(200, 7), inputs(200, 7, seed=1)


@pytest.fixture(autouse=True, scope="module")
def products_by_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # those by tile units: test_gram.py
        patch.setattr(gram, "available", lambda *_: False)
        yield


def collect(need: Need, *parts: tuple[Tensor, Tensor]) -> Moments:
    collector = Collector(parts[0][0].shape[1], need)
    for x, x0 in parts:
        collector.add(x, x0)
    return collector.finish("here")


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found.double() - expected).abs().max()) <= FP32_PRODUCTS * float(expected.abs().max())


@given(st.lists(st.integers(0, 60), max_size=3))
def test_moments_are_those_of_float64_however_tokens_are_split(sizes: list[int]) -> None:
    sizes = [*sizes, 200 - sum(sizes)]
    parts = list(zip(X.split(sizes), X0.split(sizes), strict=True))
    found, x, x0 = collect("cross", *parts), X.double(), X0.double()

    assert found.cross is not None and found.dense_mean is not None
    assert 200 == found.tokens
    assert close(found.gram, x.T @ x / 200)
    assert close(found.cross, x.T @ x0 / 200)
    torch.testing.assert_close(found.mean, x.mean(0))
    torch.testing.assert_close(found.dense_mean, x0.mean(0))


def test_squares_are_the_diagonal_of_the_gram_matrix() -> None:
    few, all_of_it = collect("squares", (X, X)), collect("gram", (X, X))

    assert (7,) == few.gram.shape
    assert not few.mean.any()  # nobody who asks for squares only reads it
    assert close(few.squares, (X.double() ** 2).mean(0))
    assert close(all_of_it.squares, (X.double() ** 2).mean(0))


@pytest.mark.parametrize("cols", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips_and_chunks_give_the_same_matrix(monkeypatch: pytest.MonkeyPatch, cols: int, dtype: torch.dtype) -> None:
    x, x0 = X[:, :cols].to(dtype), X0[:, :cols].to(dtype)
    monkeypatch.setattr(moments, "_STRIP", 2)
    monkeypatch.setattr(moments, "_AT_ONCE", 32)
    monkeypatch.setattr(moments, "_SINGLE", 64)
    found = collect("cross", (x, x0))

    assert found.cross is not None
    assert close(found.gram, x.double().T @ x.double() / 200)
    assert close(found.cross, x.double().T @ x0.double() / 200)
    assert torch.equal(found.gram, found.gram.T)


@given(st.sampled_from(["squares", "gram", "cross"]), st.integers(1, 250), st.lists(st.integers(0, 60), max_size=8))
def test_tokens_that_wait_to_be_multiplied_are_neither_lost_nor_counted_twice(
    need: Need, chunk: int, sizes: list[int]
) -> None:
    sizes = [size for size in sizes if sum(sizes) <= 200] or [200]
    x, x0 = X[: sum(sizes)], X0[: sum(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_AT_ONCE", chunk)
        patch.setattr(moments, "_SINGLE", 2 * chunk)
        found = collect(need, *zip(x.split(sizes), x0.split(sizes), strict=True))
    tokens, wide = max(sum(sizes), 1), x.double()

    assert sum(sizes) == found.tokens
    assert close(found.squares, wide.square().sum(0) / tokens)
    if need != "squares":
        assert close(found.gram, wide.T @ wide / tokens)
        torch.testing.assert_close(found.mean, wide.sum(0) / tokens, rtol=1e-5, atol=1e-6)
    if need == "cross":
        assert found.cross is not None and found.dense_mean is not None
        assert close(found.cross, wide.T @ x0.double() / tokens)
        torch.testing.assert_close(found.dense_mean, x0.double().sum(0) / tokens, rtol=1e-5, atol=1e-6)
    else:
        assert found.cross is None and found.dense_mean is None


def _trace(held: Tensor) -> float:
    """Of a Gram matrix of 7 columns, held as one strip."""
    return float(held.view(7, 7).trace())


def test_few_tokens_wait_and_many_do_not() -> None:
    collector, squares = Collector(7, "gram"), X.double().T @ X.double()
    collector.add(X)
    assert not collector._products
    for _ in range(2):
        collector.add(X)

    assert _trace(collector._products["gram"]) == pytest.approx(3 * float(squares.trace()), rel=1e-5)
    for _ in range(9):
        collector.add(X)
    assert torch.float64 == collector._sums["mean"].dtype
    both = _trace(collector._sums["gram"]) + _trace(collector._products["gram"])
    assert both == pytest.approx(12 * float(squares.trace()), rel=1e-5)


def test_centred_moments_are_covariances() -> None:
    shift = torch.linspace(-2, 2, 7)
    found = collect("cross", (X + shift, X0 - shift)).centred()
    x, x0 = X.double() - X.double().mean(0), X0.double() - X0.double().mean(0)
    allowed = 10 * FP32_PRODUCTS * float((X + shift).square().max())  # the means were 2 and are taken off in fp32

    assert found.cross is not None
    assert float((found.gram - x.T @ x / 200).abs().max()) < allowed
    assert float((found.cross - x.T @ x0 / 200).abs().max()) < allowed


def test_without_a_dense_stream_the_centre_is_the_same() -> None:
    found = collect("gram", (X + 1, X + 1)).centred()

    assert found.cross is None
    torch.testing.assert_close(found.gram.double(), torch.cov((X + 1).double().T, correction=0), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-3]))
def test_rounding_leaves_no_variance_below_zero(seed: int, varies: float) -> None:
    x = inputs(1, 7, seed).expand(300, 7) + varies * inputs(300, 7, seed + 1)
    found = collect("gram", (x, x))

    assert bool((found.centred().squares >= 0).all())
    assert bool((found.centred(moments.ROUNDING).squares > 0).all())
    variance = x.double().var(0, correction=0)
    assert bool((found.centred(moments.ROUNDING).squares - variance < 4e-5 * found.squares).all())


@pytest.mark.parametrize("need", ["squares", "gram", "cross"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_named(need: Need, value: float) -> None:
    bad = X.clone()
    bad[3, 2] = value

    with pytest.raises(SparsecError, match=r"here: its inputs hold NaN or Inf on the calibration data"):
        collect(need, (bad, X0))


def test_a_dense_stream_that_is_not_finite_is_named_too() -> None:
    bad = X0.clone()
    bad[3, 2] = float("nan")

    with pytest.raises(SparsecError, match=r"here: its inputs hold NaN"):
        collect("cross", (X, bad))


def test_no_token_at_all_gives_zeros() -> None:
    found = collect("gram", (X[:0], X[:0]))

    assert 0 == found.tokens
    assert not found.gram.any() and not found.mean.any()
