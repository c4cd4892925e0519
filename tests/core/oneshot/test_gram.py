"""Products by tile units against float64; skipped where the processor has none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from sparsec.oneshot import gram, native
from sparsec.oneshot.moments import Collector, _nelement, _strips

RIGHT_TO = 3.2e-5  # of sqrt(G_ii G_jj): twice 2^-17 of what each value loses, and 2^-16 for the product of low parts
AROUND = 2048  # elements on both sides of the result, which stay as they are

pytestmark = pytest.mark.skipif(not gram.available(), reason="no AMX here (or no compiled library)")


@pytest.fixture(autouse=True)
def one_thread_more() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(tokens: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(seed)) + 0.3


def added(x: Tensor, x0: Tensor, strip: int, times: int = 1) -> Tensor:
    """The matrix; 0 below the strips."""
    cols = x.shape[1]
    around = torch.full((_nelement(cols, strip) + 2 * AROUND,), float("nan"))
    around[:AROUND] = around[-AROUND:] = 5.0
    sums = around[AROUND:-AROUND]
    for time in range(times):
        gram.add(x, x0, sums, strip, fresh=not time)
    assert (around[:AROUND] == 5).all() and (around[-AROUND:] == 5).all()
    found = torch.zeros(cols, cols)
    for i, part in _strips(sums, cols, strip):
        found[i : i + strip, i:] = part
    return found


def worst(found: Tensor, x: Tensor, x0: Tensor, strip: int, times: int = 1) -> float:
    """Largest error of an element, of sqrt(sum x_i^2 sum x0_j^2)."""
    x, x0 = x.double(), x0.double()
    expected = times * x.T @ x0
    if strip < len(found):
        for i in range(0, len(found), strip):
            expected[i + strip :, i : i + strip] = 0
    scale = times * x.norm(dim=0).outer(x0.norm(dim=0))
    return float(((found - expected).abs() / scale.clamp_min(1e-30)).max())


@given(st.integers(1, 300), st.integers(1, 200), st.booleans(), st.integers(0, 99))
@example(256, 64, False, 0)
@example(257, 65, False, 0)
@example(31, 31, True, 0)
@example(288, 33, True, 0)
def test_products_are_those_of_float64_for_all_residues(tokens: int, cols: int, crossed: bool, seed: int) -> None:
    x = random(tokens, cols, seed)
    x0, strip = (random(tokens, cols, seed + 1), cols) if crossed else (x, 64)

    assert worst(added(x, x0, strip, times=2), x, x0, strip, times=2) <= RIGHT_TO


def test_no_token_adds_nothing() -> None:
    assert not added(random(0, 70), random(0, 70), 64, times=2).any()


def test_more_columns_than_stay_in_the_cache_together() -> None:
    x = random(600, 555)

    assert worst(added(x, x, 64), x, x, 64) <= RIGHT_TO
    assert worst(added(x, random(600, 555, 1), 555), x, random(600, 555, 1), 555) <= RIGHT_TO


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = random(70, 100)
    x[37, 41] = bad

    assert not torch.isfinite(added(x, x, 64)[41, 41])


def test_small_and_large_values_lose_no_more() -> None:
    x = random(64, 40) * torch.logspace(-15, 15, 40)

    assert worst(added(x, x, 64), x, x, 64) <= RIGHT_TO


def test_results_are_the_same_bits_for_any_number_of_threads() -> None:
    x, found = random(300, 333), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(added(x, x, 64))

    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_is_not_laid_out_in_rows_is_copied() -> None:
    x = random(96, 50).T.contiguous().T

    assert torch.equal(added(x.contiguous(), x.contiguous(), 64), added(x, x, 64))


@pytest.mark.parametrize("named", ["reference", "portable", "avx512"])
def test_sparsec_isa_turns_it_off(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("SPARSEC_ISA", named)

    assert not gram.available()


def test_collected_moments_come_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, product = [], gram.add

    def counted(x: Tensor, x0: Tensor, sums: Tensor, strip: int, fresh: bool) -> None:
        calls.append(strip)
        product(x, x0, sums, strip, fresh)

    monkeypatch.setattr(gram, "add", counted)
    x, x0 = random(90, 70), random(90, 70, 1)
    collector = Collector(70, "cross")
    collector.add(x, x0)
    found = collector.finish("here")

    assert [64, 70] == calls
    assert found.cross is not None
    assert worst(found.cross * 90, x, x0, 70) <= RIGHT_TO
    assert worst(found.gram * 90, x, x, 70) <= RIGHT_TO


def test_a_library_without_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", lambda: None)

    assert not gram.available()


def test_what_is_elsewhere_than_in_ordinary_memory_is_left_to_torch() -> None:
    assert not gram.available(torch.empty(2, 3, device="meta"))
    assert not native.available(torch.empty(2, 3), torch.empty(2, 3, device="meta"))
    assert native.available(torch.empty(2, 3))
