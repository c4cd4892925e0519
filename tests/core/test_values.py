"""Values may be stored as bf16 or int8; what is stored is what decompress gives and what the operators compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import random
from strategies import sparse_patterns, weights
from torch import Tensor

from sparsec.errors import ArtifactError, PatternError
from sparsec.layout import (
    INT8_MAX,
    SparseLayout,
    Values,
    compress,
    decompress,
    stored_as,
    table_bytes,
    validate,
)
from sparsec.ops import int8_linear, nm_linear, nm_weight, quantise_tokens
from sparsec.pattern import Pattern

DENORMAL = 2.0**-126
BF16_ROUNDING = 2.0**-8  # half a unit in the last of 8 bits, relative
PATTERNS = ["2:4", "3:2:5", "16:2:8", "unstructured:0.5"]


def stored(text: str, values: Values, shape: tuple[int, int, int] = (1, 7, 13)) -> SparseLayout:
    pattern, weight = Pattern.parse(text), random(*shape)
    return stored_as(compress(weight, pattern, pattern.project(weight.abs())), values)


# The law --------------------------------------------------------------------------------------------------------------


@given(pattern=sparse_patterns(), data=st.data())
def test_int8_keeps_every_weight_within_half_a_step_of_its_row(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    exact = compress(weight, pattern, pattern.project(weight.abs()))
    layout = stored_as(exact, "int8")
    found, expected = decompress(layout), decompress(exact)

    assert layout.scales is not None
    assert torch.float32 == found.dtype
    assert torch.equal(expected.abs().amax(2) / INT8_MAX, layout.scales)
    step = layout.scales[:, :, None] * (1 + 2.0**-20)
    assert bool(((found - expected).abs() <= step / 2 + DENORMAL).all())
    assert not bool(found[expected == 0].any())
    assert not bool(torch.signbit(found[found == 0]).any())
    assert table_bytes(pattern, layout.shape, 1) == layout.nbytes
    validate(layout, "site")


@given(pattern=sparse_patterns(), data=st.data())
def test_decompress_gives_value_times_scale(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    layout = stored_as(compress(weight, pattern, pattern.project(weight.abs())), "int8")
    as_integers = dataclasses.replace(layout, values=layout.values.float(), scales=None)

    assert layout.scales is not None
    assert torch.equal(decompress(as_integers) * layout.scales[:, :, None], decompress(layout))


@given(pattern=sparse_patterns(), data=st.data())
def test_rounding_again_changes_no_value(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    selection = pattern.project(weight.abs())
    layout = stored_as(compress(weight, pattern, selection), "int8")
    again = stored_as(compress(decompress(layout), pattern, selection), "int8")

    assert torch.equal(layout.values, again.values)
    assert layout.scales is not None and again.scales is not None
    torch.testing.assert_close(layout.scales, again.scales, rtol=2.0**-22, atol=0)


@given(pattern=sparse_patterns(), data=st.data())
def test_bf16_keeps_every_weight_within_its_rounding(pattern: Pattern, data: st.DataObject) -> None:
    weight = data.draw(weights())
    exact = compress(weight, pattern, pattern.project(weight.abs()))
    layout = stored_as(exact, "bf16")
    found, expected = decompress(layout, torch.float32), decompress(exact)

    assert torch.bfloat16 == layout.values.dtype
    assert torch.equal(expected.bfloat16().float(), found)
    assert bool(((found - expected).abs() <= expected.abs() * BF16_ROUNDING + DENORMAL).all())
    assert table_bytes(pattern, layout.shape, 2) == layout.nbytes
    validate(layout, "site")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_row_of_zeros_has_scale_zero_and_stays_zero(pattern: str) -> None:
    parsed, weight = Pattern.parse(pattern), random(1, 6, 16)
    weight[0, 2] = 0.0
    layout = stored_as(compress(weight, parsed, parsed.project(torch.rand(1, 6, 16))), "int8")

    assert layout.scales is not None
    assert 0.0 == layout.scales[0, 2]
    assert not bool(decompress(layout)[0, 2].any())
    assert bool(decompress(layout).isfinite().all())


@pytest.mark.parametrize("scale", [1e-45, 1e-44, 1e-40, 1e-30, 3e38])
def test_rows_of_any_size_stay_finite(scale: float) -> None:
    parsed, weight = Pattern.parse("2:4"), torch.rand(1, 6, 16) * scale
    layout = stored_as(compress(weight, parsed, parsed.project(weight)), "int8")

    validate(layout, "site")
    assert bool(decompress(layout).isfinite().all())


def test_fp32_changes_nothing() -> None:
    layout = stored("2:4", "fp32")

    assert layout.scales is None
    assert ("fp32", "bf16", "int8") == (layout.stored, stored("2:4", "bf16").stored, stored("2:4", "int8").stored)


def test_a_weight_beyond_bf16_is_refused() -> None:
    weight = torch.full((1, 2, 4), torch.finfo(torch.float32).max)
    pattern = Pattern.parse("2:4")
    with pytest.raises(PatternError, match="beyond the range of bf16"):
        stored_as(compress(weight, pattern, pattern.project(weight)), "bf16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"scales": None}, r"table scales .* found nothing"),
        (lambda one: {"scales": one.scales[:, :3]}, r"table scales .* \(1, 7\), found \(1, 3\)"),
        (lambda one: {"scales": one.scales.double()}, "finite float32"),
        (lambda one: {"scales": one.scales * torch.nan}, "finite float32"),
        (lambda one: {"scales": -one.scales}, "0 or more"),
        (lambda one: {"values": torch.full_like(one.values, -128)}, "-127..127"),
        (lambda one: {"values": one.values.float()}, "must be int8"),
        (lambda one: {"values": one.values.to(torch.uint8)}, "must be int8"),
    ],
)
def test_damaged_tables_are_refused_by_name(change, message: str) -> None:  # type: ignore[no-untyped-def]
    layout = stored("2:4", "int8")

    with pytest.raises(ArtifactError, match=f"^encoder.fc1: .*{message}"):
        validate(dataclasses.replace(layout, **change(layout)), "encoder.fc1")


# What operators compute -----------------------------------------------------------------------------------------------


@given(data=st.data())
def test_tokens_are_rounded_within_half_a_step(data: st.DataObject) -> None:
    x = data.draw(weights())
    q, scale = quantise_tokens(x)

    assert (torch.int8, x.shape, (*x.shape[:-1], 1)) == (q.dtype, q.shape, scale.shape)
    assert bool(((q * scale - x).abs() <= scale * (0.5 + 2.0**-15)).all())
    assert bool((q.abs().amax(-1) == INT8_MAX * (x != 0).any(-1)).all())


def test_a_token_that_is_not_finite_has_no_scale_and_a_tiny_one_is_zero() -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [2.0**-101, 0.0], [2.0**-100, 0.0], [0.0, 0.0]])
    q, scale = quantise_tokens(x)

    assert [[0, 0], [0, 0], [0, 0], [127, 0], [0, 0]] == q.tolist()
    assert [True, True, False, False, False] == scale[:, 0].isnan().tolist()
    assert 0.0 == scale[2, 0] == scale[4, 0] < scale[3, 0]


def arguments(layout: SparseLayout) -> tuple[tuple[Tensor | None, ...], tuple[str, int]]:
    return (layout.values, layout.positions, layout.columns), (str(layout.pattern), layout.shape[2])


@given(data=st.data())
def test_int8_linear_is_an_exact_integer_product_scaled_in_one_order(data: st.DataObject) -> None:
    rows, cols, tokens = (data.draw(st.integers(1, top)) for top in (20, 40, 5))
    layout = stored(f"{data.draw(st.integers(1, 9))}:2:{data.draw(st.integers(4, 12))}", "int8", (1, rows, cols))
    x, bias = random(tokens, cols, seed=1), random(rows, seed=2)
    q, scale = quantise_tokens(x)
    integers = decompress(dataclasses.replace(layout, values=layout.values.double(), scales=None))[0].long()
    assert layout.scales is not None

    expected = (q.long() @ integers.T).float() * scale * layout.scales[0] + bias
    assert torch.equal(expected, int8_linear(x, layout, bias))


def test_int8_linear_is_close_to_the_exact_product() -> None:
    layout = stored("16:2:8", "int8", (1, 64, 256))
    x = random(9, 256, seed=1)
    exact = x @ decompress(layout)[0].T

    # Each activation is off by at most half of one of 127 steps; sums of 64 independent such errors grow as sqrt(64).
    assert float((int8_linear(x, layout, None) - exact).abs().max() / exact.abs().max()) <= 2e-2


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_only_shared_columns_round_the_activations(pattern: str, values: Values) -> None:
    layout = stored(pattern, values)
    tables, rest = arguments(layout)
    x, bias = random(3, 13, seed=1), random(7, seed=2)
    found = nm_linear(x, *tables, bias, *rest, layout.scales)

    if values == "int8" and ":2:" in pattern:
        assert torch.equal(int8_linear(x, layout, bias), found)
        return
    assert torch.equal(torch.nn.functional.linear(x, decompress(layout, torch.float32)[0], bias), found)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_the_operators_keep_torchs_contract(pattern: str, values: Values) -> None:
    layout = stored(pattern, values)
    tables, rest = arguments(layout)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(nm_linear, (random(2, 13), *tables, None, *rest, layout.scales), test_utils=checks)
    view = ([0, 1], [7, 13], layout.scales, torch.float32)
    torch.library.opcheck(nm_weight, (*tables, *rest, *view), test_utils=checks)
    assert torch.equal(decompress(layout, torch.float32)[0], nm_weight(*tables, *rest, *view))
