"""The CPU kernels compute x @ weight.T + bias at every level, shape and thread count."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import run, stream_linear
from sparsec.backends.kernel.cpu.stream import check_stream, pack
from sparsec.layout import SparseLayout, decompress

# Rounding of one fp32 operation. A row of k products and a bias is at most k + 2 such roundings deep, so its error is
# below (k + 2) * ROUNDING * (sum of the products' magnitudes): a proven bound, not a measured one.
ROUNDING = 2.0**-24

NM_PATTERNS = ("1:1", "1:4", "2:4", "4:4", "1:5", "2:8", "4:8", "3:7", "5:9", "1:16", "16:16", "3:17", "5:256")
VNM_PATTERNS = ("1:2:4", "7:2:9", "10:2:5", "16:2:6", "64:2:5", "64:2:8", "128:2:16", "33:2:40", "16:2:17", "64:2:40")
STRIPS = ("16:2:5@strip", "64:2:8@strip@moved", "48:2:40@strip@moved")
PATTERNS = (*NM_PATTERNS, *VNM_PATTERNS, *STRIPS)
PATTERNS_AND_LEVELS = [(pattern, level) for pattern in PATTERNS for level in library.supported()]


def group(pattern: str) -> int:
    """M."""
    return int(pattern.split("@")[0].split(":")[-1])


def assert_close(y: Tensor, x: Tensor, layout: SparseLayout, bias: Tensor | None) -> None:
    """y equals the float64 result within the rounding bound."""
    weight = decompress(layout)[0].double()
    expected = x.double() @ weight.T
    magnitude = x.double().abs() @ weight.abs().T
    if bias is not None:
        expected, magnitude = expected + bias, magnitude + bias.abs()
    depth = layout.values.shape[2] * layout.values.shape[3] + 2
    assert bool(((y - expected).abs() <= depth * ROUNDING * magnitude + 1e-30).all())


@pytest.mark.parametrize(("pattern", "level"), PATTERNS_AND_LEVELS)
def test_all_residues_of_rows_and_columns(make_layout, pattern: str, level: library.Level) -> None:
    m = group(pattern)
    for case in range(64):
        rows, cols, tokens = case + 1 + 64 * (case % 3 == 0), (case % 3) * m + case * 5 % m + 1, case * 37 % 100 + 1
        layout = make_layout(pattern, rows, cols, case)
        x, bias = torch.randn(tokens, cols), torch.randn(rows) if case % 2 else None

        assert_close(run(x, pack(layout), bias, rows, 1, level), x, layout, bias)


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize("pattern", ["2:4", "64:2:5", "3:40", "32:2:5@strip@moved"])
def test_every_token_count_and_many_chunk_ranges(make_layout, pattern: str, level: library.Level) -> None:
    # 1500 columns: the panels of larger blocks no longer fit the first-level cache, so y is accumulated in parts.
    rows, cols = 80, 1500
    layout = make_layout(pattern, rows, cols, 0)
    stream, x, bias = pack(layout), torch.randn(100, cols), torch.randn(rows)
    for tokens in range(1, 101):
        assert_close(run(x[:tokens], stream, bias, rows, 1, level), x[:tokens], layout, bias)


@pytest.mark.parametrize("level", library.supported())
@pytest.mark.parametrize(
    ("pattern", "tokens"),
    [
        *(("64:2:8", 1), ("2:4", 5), ("64:2:5", 200), ("2:20", 70)),
        *(("64:2:5@strip", 200), ("64:2:5@strip@moved", 1), ("64:2:5@strip@moved", 40)),
    ],
)
def test_two_threads_give_the_bits_of_one(make_layout, pattern: str, tokens: int, level: library.Level) -> None:
    layout = make_layout(pattern, 1100, 900, 0)  # enough work for the second thread at every level
    stream, x = pack(layout), torch.randn(tokens, 900)

    one = run(x, stream, None, 1100, 1, level)
    assert torch.equal(one, run(x, stream, None, 1100, 2, level))
    assert_close(one, x, layout, None)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_patterns(make_layout, data: st.DataObject) -> None:
    shared = data.draw(st.booleans())
    m = data.draw(st.integers(4 if shared else 1, 256) | st.integers(4 if shared else 1, 17))
    n = data.draw(st.integers(1, m))
    pattern = f"{data.draw(st.integers(1, 70) | st.sampled_from((16, 64)))}:2:{m}" if shared else f"{n}:{m}"
    if shared and data.draw(st.booleans()):
        pattern = f"{data.draw(st.sampled_from((16, 48)))}:2:{m}@strip{data.draw(st.sampled_from(('', '@moved')))}"
    rows, cols, tokens = (data.draw(st.integers(1, top)) for top in (150, 300, 40))
    layout = make_layout(pattern, rows, cols, data.draw(st.integers(0, 9)))
    stream, x = pack(layout), torch.randn(tokens, cols)
    check_stream(stream)
    for level in library.supported():
        assert_close(run(x, stream, None, rows, 1, level), x, layout, None)


@pytest.mark.parametrize("tokens", [1, 6, 30])
@pytest.mark.parametrize(("pattern", "level"), PATTERNS_AND_LEVELS)
def test_only_kept_activations_reach_the_output(make_layout, pattern: str, level: library.Level, tokens: int) -> None:
    rows, cols = 20, 3 * group(pattern) + 3
    layout = make_layout(pattern, rows, cols, 0)
    mask = decompress(layout)[0] != 0
    stream, finite = pack(layout), torch.randn(tokens, cols)
    for row in (0, 7, rows - 1):
        poisoned = run(torch.where(mask[row], finite, torch.nan), stream, None, rows, 1, level)
        assert torch.equal(run(finite, stream, None, rows, 1, level)[:, row], poisoned[:, row])
    kept = int(mask[7].nonzero()[0])
    for value in (torch.nan, torch.inf):
        x = finite.clone()
        x[-1, kept] = value
        y = run(x, stream, None, rows, 1, level)

        assert not y[-1, 7].isfinite()
        assert torch.equal(y.isfinite().sum(), (~mask[:, kept]).sum() + (tokens - 1) * rows)


def test_any_leading_shape_and_strides(make_layout) -> None:
    layout = make_layout("64:2:5", 70, 33, 0)
    stream, wide = pack(layout), torch.randn(3, 33, 8)
    y = stream_linear(wide.transpose(1, 2), stream, None, 70)

    assert y.shape == (3, 8, 70)
    assert_close(y.flatten(0, 1), wide.transpose(1, 2).flatten(0, 1), layout, None)
    assert stream_linear(wide[0, :, 0], stream, None, 70).shape == (70,)
    assert stream_linear(torch.empty(0, 4, 33), stream, None, 70).shape == (0, 4, 70)


def test_wrong_arguments_are_named(make_layout) -> None:
    stream, x = pack(make_layout("2:4", 8, 12, 0)), torch.randn(2, 12)
    with pytest.raises(TypeError, match="bfloat16"):
        stream_linear(x.bfloat16(), stream, None, 8)
    with pytest.raises(TypeError, match="bias"):
        stream_linear(x, stream, torch.zeros(7), 8)
    with pytest.raises(ValueError, match="8 x 12; found out_features 8, in_features 13"):
        stream_linear(torch.randn(2, 13), stream, None, 8)
    with pytest.raises(ValueError, match="8 x 12; found out_features 9"):
        stream_linear(x, stream, None, 9)
    with pytest.raises(ValueError, match="made by"):
        stream_linear(x, stream[:-1], None, 8)
    with pytest.raises(RuntimeError, match="no backward"):
        stream_linear(x.requires_grad_(), stream, None, 8)
    with torch.no_grad():
        assert stream_linear(x, stream, None, 8).shape == (2, 8)


def test_python_threads_may_call_at_once(make_layout) -> None:
    stream, x = pack(make_layout("64:2:8", 512, 512, 0)), torch.randn(50, 512)
    expected = stream_linear(x, stream, None, 512)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: stream_linear(x, stream, None, 512), range(12)))

    assert all(torch.equal(expected, y) for y in results)


def test_registered_op_is_well_formed(make_layout) -> None:
    stream, x = pack(make_layout("2:8", 24, 40, 0)), torch.randn(2, 3, 40)
    torch.library.opcheck(torch.ops.sparsec.stream_linear.default, (x, stream, torch.zeros(24), 24, "gelu"))


def test_export_keeps_one_node(make_layout) -> None:
    class Layer(torch.nn.Module):
        def __init__(self, stream: Tensor) -> None:
            super().__init__()
            self.register_buffer("stream", stream)

        def forward(self, x: Tensor) -> Tensor:
            return stream_linear(x, self.stream, None, 24)

    layer, x = Layer(pack(make_layout("2:8", 24, 40, 0))), torch.randn(5, 40)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("tokens", min=1, max=99)}})

    calls = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert torch.ops.sparsec.stream_linear.default in calls
    assert torch.equal(layer(x[:2]), exported.module()(x[:2]))
