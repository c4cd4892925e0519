"""What several layers of one module read is laid out for them once: rule 5 of `install`, where there is no graph.

1. While a module runs that holds several layers, the first of them that reads an x lays it out, and the others find it.
   Only the newest x has a copy, which goes with x, and at the latest when the module, or one inside it, has run. So
   nothing is kept between calls, and a CUDA graph that captures the module captures the copy.
2. It is found for the same x alone: the same object, not written to since, on the same stream of the same thread.
   Inference tensors do not tell whether they were written to: there each layer makes its copy, and so it does in
   compiled code.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsec.backends.kernel.cpu.linear import records_operators
from sparsec.backends.kernel.cuda.linear import side_by_side
from sparsec.backends.kernel.cuda.variants import MOST_DECODED


class _Running(threading.local):
    """Of this thread: whether a module runs whose layers share, and what was laid out last."""

    shares = False
    x: weakref.ref[Tensor] | None = None
    state: tuple[int, int] = (0, 0)
    """Of x, when it was laid out."""
    laid: Tensor | None = None

    def forget(self, *_: object) -> None:
        self.x = self.laid = None


_running = _Running()


def share(module: nn.Module) -> tuple[RemovableHandle, ...]:
    """Let the layers that a module holds share what they read, by hooks."""
    return module.register_forward_pre_hook(_begin), module.register_forward_hook(_end, always_call=True)


def laid_out(x: Tensor) -> Tensor:
    """x (..., cols) as `side_by_side` lays it out; found where a layer of the same module has read it before."""
    if records_operators(x) or not _running.shares or x.is_inference() or x.numel() <= MOST_DECODED * x.shape[-1]:
        return x
    known = _running.x() if _running.x else None
    state = (x._version, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)
    if known is x and state == _running.state and _running.laid is not None:
        return _running.laid
    _running.forget()
    laid = side_by_side(x)
    if laid.data_ptr() != x.data_ptr():  # otherwise there is nothing to spare, and x would keep itself
        _running.x, _running.state, _running.laid = weakref.ref(x, _running.forget), state, laid
    return laid


def _begin(*_: object) -> None:
    if not torch.compiler.is_compiling():
        _running.forget()
        _running.shares = True


def _end(*_: object) -> None:
    if not torch.compiler.is_compiling():
        _running.forget()
        _running.shares = False
