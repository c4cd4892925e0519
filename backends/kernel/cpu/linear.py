"""Run a packed stream: y = activation(x @ weight.T + bias), a few microseconds a call in eager, one op under export.

    sparsec::stream_linear(Tensor x, Tensor stream, Tensor? bias, int out_features, str activation="none",
                           str which="auto") -> Tensor

`which` is the function's `kernel`: TorchInductor has a use of its own for an argument of that name.
`out_features` is an argument because a traced stream has no readable header. Only kept weights touch x: NaN or Inf in
an activation that no row keeps does not reach y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal, NoReturn, get_args

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu.library import LEVELS, Level, level, library, unavailable_reason
from sparsec.backends.kernel.cpu.stream import describe

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
Kernel = Literal["auto", "rows", "tokens"]  # auto: by the number of tokens
# A name's place is its number in the C interface.
_ACTIVATIONS = {name: number for number, name in enumerate(get_args(Activation))}
_KERNELS = {name: number for number, name in enumerate(get_args(Kernel))}
# Looked up once: each name on the way to a function costs a call 0.03 us.
_dispatch_modes, _jit_trace = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_is_transformed = torch._C._are_functorch_transforms_active
_LEVELS = {name: number for number, name in enumerate(LEVELS)}


def stream_linear(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: Activation = "none",
    kernel: Kernel = "auto",
) -> Tensor:
    """x: (..., in_features) float32; stream: from `stream.pack`; y: (..., out_features). No gradients.

    activation: as in torch.nn.functional; gelu_tanh is gelu(approximate="tanh"). Error below 2e-6 where |y| <= 10.
    """
    if records_operators(x):
        _refuse_gradients(x)
        return torch.ops.sparsec.stream_linear(  # type: ignore[no-any-return]
            x, stream, bias, out_features, activation, kernel
        )
    if x.requires_grad:
        _refuse_gradients(x)
    return run(x, stream, bias, out_features, torch.get_num_threads(), level() or _missing(), activation, kernel)


def run(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out_features: int,
    threads: int,
    chosen: Level,
    activation: Activation = "none",
    kernel: Kernel = "auto",
) -> Tensor:
    """`stream_linear` with a given thread count and level, on plain CPU tensors."""
    if x.dtype is not torch.float32 or not x.is_cpu:
        raise TypeError(f"the CPU kernels run float32 on the CPU; found {x.dtype} on {x.device}: convert x first")
    if not stream.is_cpu or stream.dtype is not torch.uint8 or not stream.is_contiguous():
        raise TypeError(
            f"expected a stream of bytes on the CPU, found {stream.dtype} on {stream.device}: load it again"
        )
    x = x.contiguous()
    if activation not in _ACTIVATIONS or kernel not in _KERNELS:
        expected = f"one of {', '.join(_ACTIVATIONS)}, and one of {', '.join(_KERNELS)}"
        raise ValueError(f"found activation {activation}, kernel {kernel}; expected {expected}")
    shape = x.shape
    if threads < 1 or not shape:
        raise ValueError(f"expected at least 1 thread and x (..., in_features), found {threads} and x {tuple(shape)}")
    y = x.new_empty(*shape[:-1], out_features)  # ints: a tuple costs 0.6 us more
    tokens = y.numel() // out_features
    if not tokens:
        return y
    bias_at = None
    if bias is not None:
        if bias.dtype is not torch.float32 or bias.shape != (out_features,) or not bias.is_cpu:
            raise TypeError(f"expected a float32 CPU bias ({out_features},), found {bias.dtype} {tuple(bias.shape)}")
        bias = bias.contiguous()
        bias_at = bias.data_ptr()
    code = _c_function()(
        stream.data_ptr(), stream.numel(), x.data_ptr(), bias_at, y.data_ptr(), tokens, out_features, shape[-1],
        _ACTIVATIONS[activation], _KERNELS[kernel], threads, _LEVELS[chosen],
    )  # fmt: skip
    if code == 2:
        raise RuntimeError(f"this processor cannot run the {chosen} kernels")
    if code == 4:
        raise MemoryError(f"no memory for the panels of {tokens} x {shape[-1]} activations; pass fewer at once")
    if code:
        header = describe(stream)
        found = f"out_features {out_features}, in_features {shape[-1]}"
        raise ValueError(f"the stream is for a weight {header.rows} x {header.cols}; found {found}")
    return y


def records_operators(x: Tensor) -> bool:
    """Whether someone records or transforms operators, who would not see the C function write into y.

    Calling the registered op costs about 10 us, as much as a small sparse layer, so the rest goes to C directly.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or _dispatch_modes() > 0  # make_fx, fake tensors, operator counters
        or _is_transformed()  # vmap
        or _jit_trace() is not None
    )


def _refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the CPU kernels have no backward: call under torch.no_grad(), or train before lowering")


def _missing() -> NoReturn:
    raise RuntimeError(str(unavailable_reason()))


@cache
def _c_function() -> Callable[..., int]:
    return library().sparsec_linear


def _op(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: Activation = "none",
    which: Kernel = "auto",
) -> Tensor:
    return run(x, stream, bias, out_features, torch.get_num_threads(), level() or _missing(), activation, which)


def _fake(
    x: Tensor,
    stream: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation: Activation = "none",
    which: Kernel = "auto",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_ops = torch.library.Library("sparsec", "FRAGMENT")
_ops.define(
    "stream_linear(Tensor x, Tensor stream, Tensor? bias, int out_features, str activation='none', "
    "str which='auto') -> Tensor"
)
_ops.impl("stream_linear", _op, "CPU")
torch.library.register_fake("sparsec::stream_linear", _fake, lib=_ops)
