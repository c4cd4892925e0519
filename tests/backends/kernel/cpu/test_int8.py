"""The int8 kernels give the reference's bits at every level, shape and thread count; streams hold what they got."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.linear import Activation
from sparsec.errors import PatternError
from sparsec.layout import INT8_MAX, SparseLayout, stored_as
from sparsec.ops import int8_linear

# V below, at, above and no multiple of 16; M at every path: one shuffle (<= 8), two (<= 16), bytes.
PATTERNS = ("1:2:4", "7:2:9", "10:2:5", "16:2:6", "20:2:13", "64:2:5", "64:2:8", "128:2:16", "16:2:17", "33:2:40")
ACTIVATION_ERROR = 2e-6  # where |y| <= 10; see `linear.stream_linear`


@pytest.fixture(scope="session")
def make_int8(make_layout):
    return lambda *what: stored_as(make_layout(*what), "int8")


def assert_same_bits(expected: Tensor, found: Tensor) -> None:
    assert expected.shape == found.shape
    assert torch.equal(expected.view(torch.int32), found.view(torch.int32))


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_all_residues_of_rows_and_columns(make_int8, pattern: str, level: library.Level) -> None:
    m = int(pattern.split(":")[-1])
    for case in range(40):
        rows, cols, tokens = case + 1 + 64 * (case % 3 == 0), (case % 3) * m + case * 5 % m + 1, case * 37 % 100 + 1
        layout = make_int8(pattern, rows, cols, case)
        x, bias = torch.randn(tokens, cols) * 10 ** (case % 5 - 2), torch.randn(rows) if case % 2 else None

        assert_same_bits(int8_linear(x, layout, bias), int8.run(x, int8.pack(layout), bias, rows, 1, level))


@pytest.mark.parametrize("level", library.supported())
def test_every_token_count_and_ranges_of_pairs(make_int8, level: library.Level) -> None:
    # 3001 columns are 301 pairs of groups: more than one range, so that sums wait in y.
    layout = make_int8("16:2:5", 40, 3001, 0)
    stream, x, bias = int8.pack(layout), torch.randn(70, 3001), torch.randn(40)
    expected = int8_linear(x, layout, bias)
    for tokens in range(1, 71):
        assert_same_bits(expected[:tokens], int8.run(x[:tokens], stream, bias, 40, 1, level))


@pytest.mark.parametrize("level", library.supported())
def test_more_tokens_than_a_panel_holds(make_int8, level: library.Level) -> None:
    layout = make_int8("16:2:8", 16, 1600, 0)  # 100 pairs: 256 KiB are 320 tokens
    x = torch.randn(700, 1600)

    assert_same_bits(int8_linear(x, layout, None), int8.run(x, int8.pack(layout), None, 16, 1, level))


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize(("pattern", "tokens"), [("64:2:8", 1), ("64:2:5", 5), ("64:2:16", 200)])
def test_two_threads_give_the_bits_of_one(make_int8, pattern: str, tokens: int, level: library.Level) -> None:
    layout = make_int8(pattern, 2100, 1500, 0)  # enough work for the second thread at every level
    stream, x = int8.pack(layout), torch.randn(tokens, 1500)

    assert_same_bits(int8.run(x, stream, None, 2100, 1, level), int8.run(x, stream, None, 2100, 2, level))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_patterns(make_int8, data: st.DataObject) -> None:
    m = data.draw(st.integers(4, 256) | st.integers(4, 17))
    pattern = f"{data.draw(st.integers(1, 70) | st.sampled_from((16, 64)))}:2:{m}"
    rows, cols, tokens = (data.draw(st.integers(1, top)) for top in (150, 300, 40))
    layout = make_int8(pattern, rows, cols, data.draw(st.integers(0, 9)))
    stream, x = int8.pack(layout), torch.randn(tokens, cols)
    int8.check_stream(stream)
    expected = int8_linear(x, layout, None)
    for level in library.supported():
        assert_same_bits(expected, int8.run(x, stream, None, rows, 1, level))


@pytest.mark.parametrize("level", library.supported())
def test_the_largest_sums_do_not_saturate(make_int8, level: library.Level) -> None:
    """All products 127 * 127 or -127 * 127: 16-bit pairs and 32-bit sums at their limits."""
    layout = make_int8("16:2:4", 32, 4096, 0)
    for sign in (1, -1):
        full = dataclasses.replace(layout, values=torch.full_like(layout.values, INT8_MAX * sign))
        x = torch.ones(9, 4096)
        y = int8.run(x, int8.pack(full), None, 32, 1, level)

        assert_same_bits(int8_linear(x, full, None), y)
        assert torch.equal(
            torch.full((32,), float(INT8_MAX * INT8_MAX * 2048 * sign)) / INT8_MAX * layout.scales[0], y[0]
        )


@pytest.mark.parametrize("level", library.supported())
def test_rounding_is_to_the_nearest_even_step(make_int8, level: library.Level) -> None:
    """Activations half-way between two steps: the largest is 127, so a step is 1."""
    layout = make_int8("16:2:4", 16, 300, 0)
    x = torch.arange(300).float()[None].repeat(2, 1) / 2 - 60.5
    x[:, 0] = 127.0

    assert_same_bits(int8_linear(x, layout, None), int8.run(x, int8.pack(layout), None, 16, 1, level))


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_gives_nan_and_touches_no_other(
    make_int8, value: float, level: library.Level
) -> None:
    layout = make_int8("16:2:8", 40, 67, 0)
    stream, x = int8.pack(layout), torch.randn(11, 67)
    clean = int8.run(x, stream, None, 40, 1, level)
    for column in (0, 33, 66):
        poisoned = x.clone()
        poisoned[4, column] = value
        for activation in get_args(Activation):
            y = int8.run(poisoned, stream, torch.randn(40), 40, 1, level, activation)
            assert bool(y[4].isnan().all())
        y = int8.run(poisoned, stream, None, 40, 1, level)
        keep = torch.arange(11) != 4
        assert_same_bits(clean[keep], y[keep])


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-38, 2.0**-100, 3e38])
def test_tokens_of_any_size(make_int8, scale: float, level: library.Level) -> None:
    layout = make_int8("16:2:8", 20, 33, 0)
    x = (torch.rand(3, 33) * 2 - 1) * scale
    y = int8.run(x, int8.pack(layout), torch.ones(20), 20, 1, level)

    assert_same_bits(int8_linear(x, layout, torch.ones(20)), y)
    if scale < 1e-30:
        assert torch.equal(torch.ones(3, 20), y)


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("activation", get_args(Activation)[1:])
def test_activations_follow_the_bias(make_int8, activation: Activation, level: library.Level) -> None:
    functions = {
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    layout = make_int8("20:2:8", 53, 67, 0)
    x, bias = torch.randn(13, 67), torch.randn(53)
    expected = functions[activation](int8_linear(x, layout, bias))

    found = int8.run(x, int8.pack(layout), bias, 53, 1, level, activation)
    assert float((found - expected).abs().max()) <= ACTIVATION_ERROR


# Calls ----------------------------------------------------------------------------------------------------------------


def test_any_leading_shape_and_strides(make_int8) -> None:
    layout = make_int8("64:2:5", 70, 33, 0)
    stream, wide = int8.pack(layout), torch.randn(3, 33, 8)
    x = wide.transpose(1, 2)
    y = int8.int8_linear(x, stream, None, 70)

    assert_same_bits(int8_linear(x, layout, None), y)
    assert int8.int8_linear(wide[0, :, 0], stream, None, 70).shape == (70,)
    assert int8.int8_linear(torch.empty(0, 4, 33), stream, None, 70).shape == (0, 4, 70)


def test_wrong_arguments_are_named(make_int8) -> None:
    stream, x = int8.pack(make_int8("4:2:4", 8, 12, 0)), torch.randn(2, 12)
    with pytest.raises(TypeError, match="bfloat16"):
        int8.int8_linear(x.bfloat16(), stream, None, 8)
    with pytest.raises(TypeError, match="bias"):
        int8.int8_linear(x, stream, torch.zeros(7), 8)
    with pytest.raises(ValueError, match="8 x 12; found out_features 8, in_features 13"):
        int8.int8_linear(torch.randn(2, 13), stream, None, 8)
    with pytest.raises(ValueError, match="made by"):
        int8.int8_linear(x, stream[:-1], None, 8)
    with pytest.raises(ValueError, match="activation tanh"):
        int8.int8_linear(x, stream, None, 8, "tanh")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no backward"):
        int8.int8_linear(x.requires_grad_(), stream, None, 8)


def test_python_threads_may_call_at_once(make_int8) -> None:
    stream, x = int8.pack(make_int8("64:2:8", 512, 512, 0)), torch.randn(50, 512)
    expected = int8.int8_linear(x, stream, None, 512)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: int8.int8_linear(x, stream, None, 512), range(12)))

    assert all(torch.equal(expected, y) for y in results)


def test_registered_op_is_well_formed(make_int8) -> None:
    stream, x = int8.pack(make_int8("8:2:8", 24, 40, 0)), torch.randn(2, 3, 40)
    torch.library.opcheck(torch.ops.sparsec.int8_linear.default, (x, stream, torch.zeros(24), 24, "gelu"))


def test_export_keeps_one_node(make_int8) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, stream: Tensor) -> None:
            super().__init__()
            self.register_buffer("stream", stream)

        def forward(self, x: Tensor) -> Tensor:
            return int8.int8_linear(x, self.stream, None, 24)

    layer, x = Layer(int8.pack(make_int8("8:2:8", 24, 40, 0))), torch.randn(5, 40)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=1, max=99)}})

    assert torch.ops.sparsec.int8_linear.default in [node.target for node in exported.graph.nodes]
    assert torch.equal(layer(x[:2]), exported.module()(x[:2]))


# Streams --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unpack_inverts_pack(make_int8, data: st.DataObject) -> None:
    m = data.draw(st.integers(4, 256) | st.integers(4, 17))
    pattern = f"{data.draw(st.integers(1, 70) | st.sampled_from((16, 64)))}:2:{m}"
    layout: SparseLayout = make_int8(pattern, data.draw(st.integers(1, 150)), data.draw(st.integers(1, 300)), 0)
    stream = int8.pack(layout)
    again = int8.unpack(stream)

    int8.check_stream(stream)
    assert (layout.pattern, layout.shape) == (again.pattern, again.shape)
    for name, table in layout.tensors().items():
        assert torch.equal(table, again.tensors()[name]), name


@pytest.mark.parametrize(("pattern", "share"), [("64:2:5", 0.132), ("64:2:8", 0.083), ("64:2:16", 0.043)])
def test_memory_against_dense_fp32(make_int8, pattern: str, share: float) -> None:
    assert int8.pack(make_int8(pattern, 768, 768, 0)).nbytes <= share * 768 * 768 * 4


def test_header_is_read_back_and_strangers_are_refused(make_int8) -> None:
    stream = int8.pack(make_int8("10:2:20", 37, 50, 0))
    assert int8.describe(stream) == (20, 10, 37, 50)
    for stranger in (stream[:-1], stream[:5], torch.zeros(500, dtype=torch.uint8), stream.view(-1).float()):
        with pytest.raises(ValueError, match="made by"):
            int8.describe(stranger)


@pytest.mark.parametrize(("part", "value"), [("column", 20), ("column of the tail", 10), ("code", 6), ("code", 0x60)])
def test_damage_is_found(make_int8, part: str, value: int) -> None:
    stream = int8.pack(make_int8("16:2:20", 16, 50, 0))  # groups of 20, 20 and 10 columns
    codes = 192 + 64 + 64  # header and 12 bytes of columns, to 64; 16 scales; 16 sums
    stream[{"column": 128, "column of the tail": 128 + 8, "code": codes}[part]] = value

    with pytest.raises(ValueError, match="damaged"):
        int8.check_stream(stream)


def test_layouts_without_a_kernel_are_refused(make_layout, make_int8) -> None:
    with pytest.raises(PatternError, match="found int8 2:4"):
        int8.pack(make_int8("2:4", 3, 8, 0))
    with pytest.raises(PatternError, match="found fp32 4:2:8"):
        int8.pack(make_layout("4:2:8", 3, 8, 0))
    layout = make_int8("16:2:4", 3, 8, 0)
    with pytest.raises(PatternError, match="out of range"):
        int8.pack(dataclasses.replace(layout, positions=torch.full_like(layout.positions, 255)))
    with pytest.raises(PatternError, match="out of range"):
        int8.pack(dataclasses.replace(layout, columns=torch.full_like(layout.columns, 4)))
    wide = SparseLayout(layout.pattern, (1, 1, 4 * 66001), *[layout.values] * 3, layout.scales)
    with pytest.raises(PatternError, match="too large"):
        int8.pack(wide)
