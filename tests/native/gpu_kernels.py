"""The GPU kernels' sources on the CPU, as functions of a layout and activations, and what they must give."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from native import cuda_fibers
from torch import Tensor

from sparsec.backends.kernel.cuda.panels import form_of, pack
from sparsec.backends.kernel.cuda.variants import Decode, Gemm, Tile, Window
from sparsec.layout import SparseLayout, decompress

# Of a result: half a unit in the last place of bf16 or fp16, and sums of float32 in another order.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def case(make_layout, pattern: str, rows: int, cols: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple:
    """A layout, activations (tokens, cols), and a bias."""
    layout, generator = make_layout(pattern, rows, cols, dtype), torch.Generator().manual_seed(1)
    x = torch.randn(tokens, cols, generator=generator).to(dtype)
    return layout, x, torch.randn(rows, generator=generator).to(dtype)


def gemm(
    layout: SparseLayout, x: Tensor, bias: Tensor | None, tile: Tile, activation: str = "none", by_token: bool = True,
    seed: int = 0, edited: Mapping[str, str] | None = None, multicast: tuple[int, int] | None = None,
) -> Tensor:  # fmt: skip
    """y (tokens, rows) of gemm.cu, or of window.cu where `multicast` is given.

    What is not written is NaN, and so are activations that fill a line.
    """
    buffer, (_, rows, cols), tokens = pack(layout, x.dtype), layout.shape, len(x)
    form = form_of(buffer, layout.pattern, rows, cols)
    variant = Gemm(form, x.dtype, tile, activation, by_token)
    if multicast:
        variant = Window(form, x.dtype, tile, activation, by_token, multicast)
    lines = torch.nn.functional.pad(x, (0, 0, 0, -tokens % 8), value=torch.nan).T.contiguous()
    y = torch.full((tokens, rows) if by_token else (rows, lines.shape[1]), torch.nan, dtype=x.dtype)
    numbers = [
        *variant.grid(tokens), variant.shared_bytes, seed, rows, cols, tokens, lines.shape[1], y.shape[1], form.panels,
        form.steps,
    ]  # fmt: skip
    program = cuda_fibers.build(variant.kernel, variant.macros, edited)
    y = cuda_fibers.launch(program, numbers, [*form.tables(buffer).values(), lines, bias], y)
    return y if by_token else y[:, :tokens].T


def decode(
    layout: SparseLayout, x: Tensor, bias: Tensor | None, variant: Decode, splits: int = 1, turned: bool = False,
    seed: int = 0, edited: Mapping[str, str] | None = None,
) -> Tensor:  # fmt: skip
    """y (tokens, rows) of decode.cu, launched twice; turned: y is written as (rows, tokens)."""
    buffer, (_, rows, cols), tokens = pack(layout, x.dtype), layout.shape, len(x)
    form = form_of(buffer, layout.pattern, rows, cols)
    lines = torch.nn.functional.pad(x, (0, -cols % 8), value=torch.nan)
    y = torch.full((rows, tokens) if turned else (tokens, rows), torch.nan, dtype=x.dtype)
    strides = (1, tokens) if turned else (rows, 1)
    grid = variant.grid(splits)
    partial = torch.full((splits * variant.partial_floats,), torch.nan) if splits > 1 else None
    tickets = torch.zeros(grid[1], dtype=torch.int32)
    numbers = [
        *grid, variant.shared_bytes, seed, rows, cols, tokens, lines.shape[1], *strides, form.panels, form.steps, splits
    ]  # fmt: skip
    program = cuda_fibers.build("decode", variant.macros, edited)
    y = cuda_fibers.launch(program, numbers, [*form.tables(buffer).values(), lines, bias, partial, tickets], y)
    return y.T if turned else y


def expected(layout: SparseLayout, x: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """y (tokens, rows) in float64."""
    y = x.double() @ decompress(layout, torch.float64)[0].T + (0 if bias is None else bias.double())
    functional = torch.nn.functional
    applied = {
        "none": lambda y: y,
        "relu": functional.relu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "silu": functional.silu,
    }
    return applied[activation](y)


def assert_close(expected: Tensor, found: Tensor) -> None:
    """Every result is there, and within rounding."""
    allowed = ROUNDING[found.dtype] * expected.abs() + 1e-5 * expected.abs().max()
    assert bool(((found.double() - expected).abs() <= allowed).all()), (found.double() - expected).abs().max()
