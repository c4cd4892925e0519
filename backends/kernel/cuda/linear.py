"""Multiply by panels on a GPU: y = activation(x @ weight.T + bias).

    sparsec::panel_linear(Tensor x, Tensor panels, Tensor? bias, int out_features, str pattern, str activation="none",
                          bool by_token=True) -> Tensor

At most MOST_DECODED tokens run decode.cu on x as it stands, [tokens][cols]; more run gemm.cu on [cols][tokens], and so
does a pattern without window. x may have any strides: where the kernel needs others it is copied, and it is not where
x is a result with by_token=False, or contiguous and few. Only kept weights touch x.
The operator also has a CPU implementation: what the kernels must compute, on the unpacked weight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu.linear import records_operators
from sparsec.backends.kernel.cuda import variants
from sparsec.backends.kernel.cuda.driver import Gpu, gpu
from sparsec.backends.kernel.cuda.panels import DTYPES, Form, form_of, no_panels, unpack
from sparsec.backends.kernel.cuda.variants import MOST_DECODED, Activation
from sparsec.layout import decompress
from sparsec.pattern import NM, Pattern, SharedColumns

_ALIGNED = 8  # elements: 16 bytes


def panel_linear(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
    activation: Activation = "none",
    by_token: bool = True,
) -> Tensor:
    """x: (..., in_features) fp16 or bf16; panels: from `pack`, of x's type; y: (..., out_features). No gradients.

    by_token: y is contiguous; otherwise its tokens lie side by side where they are many, for the next layer's kernel.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the GPU kernels have no backward: call under torch.no_grad(), or train before lowering")
    if records_operators(x) or not x.is_cuda:
        return torch.ops.sparsec.panel_linear(  # type: ignore[no-any-return]
            x, panels, bias, out_features, pattern, activation, by_token
        )
    few = x.numel() <= MOST_DECODED * x.shape[-1]
    return run(x, panels, bias, out_features, pattern, activation, by_token or few, gpu(x.device.index))


def run(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
    activation: Activation,
    by_token: bool,
    on: Gpu,
) -> Tensor:
    """`panel_linear` on a given GPU, and as the operator: by_token alone says how y lies."""
    form = _checked(x, panels, bias, out_features, pattern, activation)
    y = _result(x, out_features, by_token)
    lines, tokens = x.reshape(-1, form.cols), x.numel() // form.cols
    if not tokens:
        return y
    flat = y.reshape(tokens, out_features)  # a view: y is new
    tables = form.tables(panels)
    weights = [tables["values"], tables["metadata"], tables["index"], tables["rows"] if form.moved else None]
    bias = None if bias is None else bias.contiguous()
    if tokens <= MOST_DECODED and form.window:
        few = variants.decode(form, x.dtype, tokens, on.device, activation)
        lines, splits = _by_token(lines), variants.splits(few, on.device)
        grid = few.grid(splits)
        partial = x.new_empty(splits * few.partial_floats, dtype=torch.float32) if splits > 1 else None
        tickets = on.tickets(grid[1]) if splits > 1 else None
        numbers = [out_features, form.cols, tokens, lines.stride(0), *flat.stride(), form.panels, form.steps, splits]
        on.launch(few, grid, [*weights, lines, bias, partial, tickets, flat], numbers)
        return y
    many = variants.gemm(form, x.dtype, tokens, on.device, activation, by_token)
    lines = _by_column(lines)
    y_stride = flat.stride(0) if by_token else flat.stride(1)
    numbers = [out_features, form.cols, tokens, lines.stride(0), y_stride, form.panels, form.steps]
    on.launch(many, many.grid(tokens), [*weights, lines, bias, flat], numbers)
    return y


def side_by_side(x: Tensor) -> Tensor:
    """x (..., cols) with its tokens side by side, as many tokens are multiplied; few, and what is so already, are x."""
    if records_operators(x) or x.numel() <= MOST_DECODED * x.shape[-1]:
        return x  # compiled code knows no number of tokens
    return _by_column(x.reshape(-1, x.shape[-1])).T.reshape(x.shape)


def _checked(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, pattern: str, activation: str) -> Form:
    """The form of the panels; raises TypeError or ValueError where the arguments do not fit."""
    if x.dtype not in DTYPES:
        raise TypeError(f"the GPU kernels run bfloat16 and float16, found {x.dtype}: convert x first")
    if not x.dim() or x.dtype.is_complex or activation not in variants.ACTIVATIONS:
        expected = f"x (..., in_features), and one of {', '.join(variants.ACTIVATIONS)}"
        raise ValueError(f"expected {expected}, found x {tuple(x.shape)}, {activation}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (out_features,) or bias.device != x.device):
        found = f"{bias.dtype} {tuple(bias.shape)} on {bias.device}"
        raise TypeError(f"expected a bias {x.dtype} ({out_features},) on {x.device}, found {found}")
    if panels.device != x.device or not panels.is_contiguous() or panels.data_ptr() % 16:
        raise TypeError(f"expected contiguous panels on {x.device}, found them on {panels.device}: load them again")
    return form_of(panels, _pattern(pattern), out_features, x.shape[-1])


@cache
def _pattern(text: str) -> NM | SharedColumns:
    pattern = Pattern.parse(text)
    if reason := no_panels(pattern):
        raise ValueError(reason)
    assert isinstance(pattern, (NM, SharedColumns))
    return pattern


def _result(x: Tensor, out_features: int, by_token: bool) -> Tensor:
    """An empty y; with its tokens side by side it has a multiple of 8 of them in memory."""
    if by_token:
        return x.new_empty(*x.shape[:-1], out_features)
    tokens = 1
    for size in x.shape[:-1]:
        tokens = tokens * size
    padded = (tokens + _ALIGNED - 1) // _ALIGNED * _ALIGNED
    turned: Tensor = x.new_empty(out_features, padded)[:, :tokens].unflatten(1, x.shape[:-1])
    return turned.movedim(0, -1)


def _by_token(x: Tensor) -> Tensor:
    """(tokens, cols) with lines that begin at 16 bytes; copied where they do not."""
    tokens, cols = x.shape
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (tokens == 1 or x.stride(0) % _ALIGNED == 0):
        return x
    return x.new_empty(tokens, -(-cols // _ALIGNED) * _ALIGNED)[:, :cols].copy_(x)


def _by_column(x: Tensor) -> Tensor:
    """(tokens, cols) -> (cols, tokens), whose lines take a multiple of 8 elements; copied where they do not."""
    tokens, cols = x.shape
    padded = -(-tokens // _ALIGNED) * _ALIGNED
    stride, end = x.stride(1), x.storage_offset() + (cols - 1) * x.stride(1) + padded
    fits = stride % _ALIGNED == 0 and stride >= padded and end * x.element_size() <= x.untyped_storage().nbytes()
    if x.stride(0) == 1 and x.data_ptr() % 16 == 0 and fits:
        return x.T
    return x.new_empty(cols, padded)[:, :tokens].copy_(x.T)


def _reference(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
    activation: Activation = "none",
    by_token: bool = True,
) -> Tensor:
    _checked(x, panels, bias, out_features, pattern, activation)
    layout = unpack(panels, _pattern(pattern), out_features, x.shape[-1], x.dtype)
    y = torch.nn.functional.linear(
        x.float(), decompress(layout, torch.float32)[0], None if bias is None else bias.float()
    )
    applied: dict[Activation, Callable[[Tensor], Tensor]] = {
        "none": lambda y: y,
        "relu": torch.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
        "silu": torch.nn.functional.silu,
    }
    return _result(x, out_features, by_token).copy_(applied[activation](y))


def _on_cuda(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
    activation: Activation = "none",
    by_token: bool = True,
) -> Tensor:
    return run(x, panels, bias, out_features, pattern, activation, by_token, gpu(x.device.index))


def _fake(
    x: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    out_features: int,
    pattern: str,
    activation: Activation = "none",
    by_token: bool = True,
) -> Tensor:
    return _result(x, out_features, by_token)


_ops = torch.library.Library("sparsec", "FRAGMENT")
_ops.define(
    "panel_linear(Tensor x, Tensor panels, Tensor? bias, int out_features, str pattern, str activation='none', "
    "bool by_token=True) -> Tensor"
)
_ops.impl("panel_linear", _reference, "CPU")
_ops.impl("panel_linear", _on_cuda, "CUDA")
torch.library.register_fake("sparsec::panel_linear", _fake, lib=_ops)
