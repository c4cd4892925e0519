"""Activations fused into the kernels are those of torch, at every level and for every token count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import run, stream_linear
from sparsec.backends.kernel.cpu.stream import pack

TOLERANCE = 2e-6  # absolute where |x| <= 10; relative to |y| beyond, where 1 ulp is larger than that
# Computed in float64: for more than one float32, torch calls oneDNN, whose gelu gives NaN for Inf on some processors.
REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
LEVELS_AND_NAMES = [(level, name) for level in library.supported() for name in REFERENCES]


@pytest.mark.parametrize(("level", "name"), LEVELS_AND_NAMES)
def test_values_match_torch(make_layout, level: library.Level, name: str) -> None:
    # A weight of one column: bias 0 and weight 1 give y = activation(x).
    layout = make_layout("1:1", 19, 1, 0)
    layout.values.fill_(1.0)
    extremes = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 87.0, -87.0, 88.5, -88.5, 1e4, -1e4, 3e38, -3e38])
    x = torch.cat([torch.linspace(-10, 10, 40_001), extremes])[:, None]
    y = run(x, pack(layout), None, 19, 1, level, name)

    expected = REFERENCES[name](x.double())
    assert bool(((y - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)).all())


@pytest.mark.parametrize(("level", "name"), LEVELS_AND_NAMES)
def test_nan_and_infinity_stay_what_torch_makes_of_them(make_layout, level: library.Level, name: str) -> None:
    layout = make_layout("1:1", 3, 1, 0)
    layout.values.fill_(1.0)
    x = torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]])
    y = run(x, pack(layout), None, 3, 1, level, name)

    expected = REFERENCES[name](x.double()).float()
    assert torch.allclose(expected.expand(4, 3), y, equal_nan=True)


@pytest.mark.parametrize(("level", "name"), LEVELS_AND_NAMES)
@pytest.mark.parametrize("pattern", ["2:4", "16:2:5", "3:20", "16:2:20", "16:2:5@strip@moved"])
def test_it_follows_the_bias_once(make_layout, pattern: str, level: library.Level, name: str) -> None:
    # 700 columns: y is accumulated in parts, and only the last part may apply the activation.
    for rows, cols, tokens in ((37, 700, 33), (64, 90, 1), (5, 20, 7), (100, 33, 70)):
        layout, bias = make_layout(pattern, rows, cols, 0), torch.randn(rows)
        stream, x = pack(layout), torch.randn(tokens, cols)
        plain = run(x, stream, bias, rows, 1, level)

        expected = REFERENCES[name](plain.double())
        found = run(x, stream, bias, rows, 1, level, name)
        assert bool(((found - expected).abs() <= TOLERANCE * expected.abs().clamp(min=1.0)).all())


def test_unknown_names_are_refused(make_layout) -> None:
    stream, x = pack(make_layout("2:4", 8, 12, 0)), torch.randn(2, 12)
    with pytest.raises(ValueError, match=r"found activation tanh.*none, relu, gelu, gelu_tanh, silu"):
        stream_linear(x, stream, None, 8, "tanh")
    with pytest.raises(ValueError, match=r"kernel panel; expected .* auto, rows, tokens"):
        stream_linear(x, stream, None, 8, kernel="panel")
