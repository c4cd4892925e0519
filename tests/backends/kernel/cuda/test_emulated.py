"""The sources of the GPU kernels, run on the CPU, against float64: all variants, all tails, any order of threads."""

from __future__ import annotations

import pytest
import torch
from native import cuda_fibers
from native.gpu_kernels import assert_close, case, decode, expected, gemm

from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import ACTIVATIONS, Decode, Tile

pytestmark = pytest.mark.skipif(cuda_fibers.missing() is not None, reason=str(cuda_fibers.missing()))
BF16, FP16 = torch.bfloat16, torch.float16
SMALL = Tile(tokens=32, warps_m=2, warps_n=2, stages=3)
SLICE = Tile(tokens=64, warps_m=2, warps_n=2, stages=2)  # the smallest of window.cu


def few(layout, tokens: int, **more) -> Decode:
    form = Form(layout.pattern, *layout.shape[1:], moved=layout.rows is not None)
    return Decode(form, layout.values.dtype, tokens, **more)


def test_gemm_windows_with_all_tails(make_layout) -> None:
    layout, x, bias = case(make_layout, "64:2:5", 70, 197, 35)
    for seed in (0, 1):
        assert_close(expected(layout, x, bias, "gelu"), gemm(layout, x, bias, SMALL, "gelu", seed=seed))


def test_window_shares_copies_in_a_cluster(make_layout) -> None:
    layout, x, _ = case(make_layout, "64:2:5", 140, 357, 75)
    for seed in (0, 1, 2):
        assert_close(expected(layout, x, None), gemm(layout, x, None, SLICE, seed=seed, multicast=(2, 2)))


def test_decode_with_all_tails_adds_up_in_one_order(make_layout) -> None:
    layout, x, bias = case(make_layout, "64:2:5", 70, 433, 3)
    variant = few(layout, 8, warps=2, activation="gelu")
    found = [decode(layout, x, bias, variant, splits=3, seed=seed) for seed in range(4)]

    assert_close(expected(layout, x, bias, "gelu"), found[0])
    assert all(torch.equal(found[0], other) for other in found[1:])


GEMMS = [  # pattern, rows, cols, tokens, dtype, tile, activation, by_token
    ("2:4", 130, 203, 40, FP16, SMALL, "silu", True),
    ("16:2:4", 64, 64, 8, BF16, Tile(16, 1, 1, 1, 2), "none", False),
    ("64:2:8", 200, 257, 41, BF16, SMALL, "gelu_tanh", False),
    ("64:2:16", 64, 1000, 9, BF16, Tile(16, 1, 1, 1, 2), "relu", True),
    ("128:2:8", 200, 300, 70, BF16, Tile(64, 1, 2, 2, 3), "none", True),
    ("128:2:6", 130, 131, 33, FP16, Tile(32, 2, 1, 2, 2), "gelu", False),
    ("32:2:6", 100, 111, 35, BF16, SMALL, "none", True),
    ("48:2:7", 150, 130, 35, BF16, SMALL, "none", False),
    ("64:2:5@strip", 200, 333, 40, BF16, SMALL, "none", True),
    ("64:2:9@strip@moved", 200, 500, 40, BF16, SMALL, "silu", True),
    ("32:2:5@strip@moved", 90, 333, 40, FP16, SMALL, "none", False),
    ("16:2:20", 70, 333, 17, BF16, Tile(32, 2, 2, 1, 2), "none", True),
    ("64:2:8", 520, 200, 150, BF16, Tile(128), "gelu", True),
    ("128:2:8", 520, 200, 131, BF16, Tile(128, 2, 4, 2, 3), "none", False),
    ("64:2:5@strip", 300, 400, 130, BF16, Tile(128, stages=2), "none", True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "rows", "cols", "tokens", "dtype", "tile", "activation", "by_token"), GEMMS)
def test_gemm(make_layout, pattern, rows, cols, tokens, dtype, tile, activation, by_token) -> None:
    layout, x, bias = case(make_layout, pattern, rows, cols, tokens, dtype)
    for seed, shift in ((0, bias), (1, None), (2, bias)):
        found = gemm(layout, x, shift, tile, activation, by_token, seed)

        assert_close(expected(layout, x, shift, activation), found)


WINDOWS = [  # pattern, rows, cols, tokens, dtype, tile, activation, by_token, multicast
    ("2:4", 130, 203, 40, FP16, Tile(64, 2, 2, 1, 3), "silu", True, (1, 1)),
    ("64:2:8", 200, 697, 141, BF16, SLICE, "gelu_tanh", False, (2, 1)),
    ("64:2:16", 64, 1000, 9, BF16, SLICE, "relu", True, (1, 2)),
    ("128:2:6", 130, 591, 133, FP16, Tile(128, 1, 4, 2, 2), "gelu", False, (4, 1)),
    ("192:2:7", 400, 350, 300, BF16, SLICE, "none", True, (2, 4)),
    ("64:2:8", 520, 700, 150, BF16, Tile(128, stages=4), "gelu", True, (2, 2)),
    ("128:2:8", 520, 700, 131, BF16, Tile(128, 2, 4, 2, 4), "none", False, (2, 2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "tokens", "dtype", "tile", "activation", "by_token", "multicast"), WINDOWS
)
def test_window_gives_the_bits_of_gemm(
    make_layout, pattern, rows, cols, tokens, dtype, tile, activation, by_token, multicast
) -> None:
    layout, x, bias = case(make_layout, pattern, rows, cols, tokens, dtype)
    same = gemm(layout, x, bias, SMALL, activation, by_token)
    for seed in (0, 1, 2):
        found = gemm(layout, x, bias, tile, activation, by_token, seed, multicast=multicast)

        assert_close(expected(layout, x, bias, activation), found)
        assert torch.equal(same, found)
    found = gemm(layout, x, None, tile, activation, by_token, 3, multicast=multicast)
    assert_close(expected(layout, x, None, activation), found)


DECODES = [  # pattern, rows, cols, tokens, dtype, what more the variant says, splits, turned
    ("2:4", 130, 203, 8, FP16, {"tokens": 8, "activation": "silu"}, 1, False),
    ("64:2:8", 200, 1100, 13, BF16, {"tokens": 16, "panels": 2, "activation": "gelu_tanh"}, 2, True),
    ("64:2:16", 64, 1000, 1, BF16, {"tokens": 8, "warps": 2, "stages": 3}, 2, False),
    ("128:2:8", 200, 1500, 32, BF16, {"tokens": 32, "warps": 4, "activation": "relu"}, 3, False),
    ("32:2:6", 100, 711, 9, BF16, {"tokens": 16, "warps": 2}, 4, False),
    ("16:2:4", 70, 64, 5, FP16, {"tokens": 8, "warps": 4, "activation": "gelu"}, 1, True),
    ("64:2:5", 320, 163, 16, BF16, {"tokens": 16, "panels": 2, "warps": 8}, 1, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "rows", "cols", "tokens", "dtype", "more", "splits", "turned"), DECODES)
def test_decode(make_layout, pattern, rows, cols, tokens, dtype, more, splits, turned) -> None:
    layout, x, bias = case(make_layout, pattern, rows, cols, tokens, dtype)
    variant = few(layout, **more)
    for seed, shift in ((0, bias), (1, None), (2, bias)):
        found = decode(layout, x, shift, variant, splits, turned, seed)

        assert_close(expected(layout, x, shift, variant.activation), found)


@pytest.mark.slow
def test_what_no_row_keeps_does_not_reach_the_result(make_layout) -> None:
    layout, x, _ = case(make_layout, "64:2:8", 64, 200, 8)
    unread = torch.ones(200, dtype=torch.bool)
    unread[(layout.columns[0, 0].long() + 8 * torch.arange(25)[:, None]).flatten()] = False
    x[:, unread] = torch.nan

    reference = expected(layout, x.nan_to_num(), None)
    assert_close(reference, gemm(layout, x, None, SMALL))
    assert_close(reference, gemm(layout, x, None, SLICE, multicast=(1, 1)))
    assert_close(reference, decode(layout, x, None, few(layout, 8, warps=2)))


def test_the_cases_reach_every_choice_of_the_sources() -> None:
    assert {case[6] for case in GEMMS} == set(ACTIVATIONS) == {case[5].get("activation", "none") for case in DECODES}
    assert {case[6] for case in WINDOWS} == set(ACTIVATIONS)
    assert {case[5].panels for case in GEMMS} == {1, 2} == {case[5].get("panels", 1) for case in DECODES}
    assert {case[4] for case in GEMMS} == {BF16, FP16} == {case[4] for case in DECODES}
