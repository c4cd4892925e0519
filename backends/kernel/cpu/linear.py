"""Run a packed stream: y = x @ weight.T + bias, a few microseconds a call in eager, one registered op under export.

    sparsec::stream_linear(Tensor x, Tensor stream, Tensor? bias, int out_features) -> Tensor

`out_features` is an argument because a traced stream has no readable header. Only kept weights touch x: NaN or Inf in
an activation that no row keeps does not reach y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsec.backends.kernel.cpu.library import LEVELS, Level, level, library, unavailable_reason
from sparsec.backends.kernel.cpu.stream import describe


def stream_linear(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """x: (..., in_features) float32; stream: from `stream.pack`; y: (..., out_features). No gradients."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("the CPU kernels have no backward: call under torch.no_grad(), or train before lowering")
    # Calling the registered op costs about 10 us, as much as a small sparse layer: only where a graph is recorded.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return torch.ops.sparsec.stream_linear(x, stream, bias, out_features)  # type: ignore[no-any-return]
    chosen = level()
    if chosen is None:
        raise RuntimeError(str(unavailable_reason()))
    return run(x, stream, bias, out_features, torch.get_num_threads(), chosen)


def run(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int, threads: int, chosen: Level) -> Tensor:
    """`stream_linear` with a given thread count and level, on plain CPU tensors."""
    if x.dtype != torch.float32 or not x.is_cpu:
        raise TypeError(f"the CPU kernels run float32 on the CPU; found {x.dtype} on {x.device}: convert x first")
    x = x.contiguous()
    if bias is not None:
        if bias.dtype != torch.float32 or bias.shape != (out_features,) or not bias.is_cpu:
            raise TypeError(f"expected a float32 CPU bias ({out_features},), found {bias.dtype} {tuple(bias.shape)}")
        bias = bias.contiguous()
    *lead, cols = x.shape
    y = x.new_empty(*lead, out_features)
    if not y.numel():
        return y
    code = library().sparsec_linear(
        stream.data_ptr(), stream.numel(), x.data_ptr(), None if bias is None else bias.data_ptr(), y.data_ptr(),
        y.numel() // out_features, out_features, cols, threads, LEVELS.index(chosen),
    )  # fmt: skip
    if code == 2:
        raise RuntimeError(f"this processor cannot run the {chosen} kernels")
    if code:
        *_, rows, stream_cols = describe(stream)
        found = f"out_features {out_features}, in_features {cols}"
        raise ValueError(f"the stream is for a weight {rows} x {stream_cols}; found {found}")
    return y


def _op(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    chosen = level()
    if chosen is None:
        raise RuntimeError(str(unavailable_reason()))
    return run(x, stream, bias, out_features, torch.get_num_threads(), chosen)


def _fake(x: Tensor, stream: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_ops = torch.library.Library("sparsec", "FRAGMENT")
_ops.define("stream_linear(Tensor x, Tensor stream, Tensor? bias, int out_features) -> Tensor")
_ops.impl("stream_linear", _op, "CPU")
torch.library.register_fake("sparsec::stream_linear", _fake, lib=_ops)
