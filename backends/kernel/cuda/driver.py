"""Load compiled kernels and launch them, through the CUDA driver, in torch's context and on its current stream.

A kernel is loaded into a GPU when it first runs there, which a CUDA graph must not capture: run once before capturing,
as torch asks for its own kernels too.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsec.backends.kernel.cuda.build import arch_of, cubin, unavailable
from sparsec.backends.kernel.cuda.variants import Decode, Device, Gemm
from sparsec.errors import UsageError

_OTHER_DRIVER = "update the NVIDIA driver, or install cuda-bindings and nvidia-cuda-nvrtc of the CUDA version it has"

_TICKETS = 1024  # enough for 65536 rows


class Gpu(Protocol):
    """What runs a variant; tests put the emulation in its place."""

    @property
    def device(self) -> Device:
        """What it offers."""

    def launch(
        self, variant: Gemm | Decode, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]
    ) -> None:
        """Run `variant` on the tensors, of which the last one is written, and numbers, in the order of its source."""

    def tickets(self, count: int) -> Tensor:
        """At least `count` counters for decode.cu, int32, at 0, that no other launch uses at the same time."""


class CudaGpu:
    """One of this machine's GPUs."""

    def __init__(self, index: int) -> None:
        found = torch.cuda.get_device_properties(index)
        self.index = index
        arch = arch_of((found.major, found.minor))
        most = found.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch does not declare it
        self.device = Device(arch, found.multi_processor_count, most)
        self._tickets: dict[int, Tensor] = {}
        self._functions: dict[Gemm | Decode, Any] = {}

    def launch(
        self, variant: Gemm | Decode, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]
    ) -> None:
        with torch.cuda.device(self.index):  # torch makes its context the current one
            function = self._functions.get(variant) or self._load(variant)
            pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            types = (*[ctypes.c_void_p] * len(pointers), *TYPES[variant.kernel])
            stream = torch.cuda.current_stream().cuda_stream
            _ok(
                _driver().cuLaunchKernel(
                    function, *grid, 1, variant.threads, 1, 1, variant.shared_bytes, stream,
                    ((*pointers, *numbers), types), 0,
                ),
                variant.kernel,
            )  # fmt: skip

    def tickets(self, count: int) -> Tensor:
        with torch.cuda.device(self.index):
            if torch.cuda.is_current_stream_capturing():  # a graph's own: it may run beside others
                return _zeros(count)
            stream = torch.cuda.current_stream().cuda_stream
            if stream not in self._tickets or len(self._tickets[stream]) < count:
                self._tickets[stream] = _zeros(max(count, _TICKETS))
            return self._tickets[stream]

    def _load(self, variant: Gemm | Decode) -> Any:
        driver, name = _driver(), variant.kernel
        module = _ok(driver.cuModuleLoadData(cubin(name, variant.macros, self.device.arch)), name)
        function = _ok(driver.cuModuleGetFunction(module, name.encode()), name)
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _ok(driver.cuFuncSetAttribute(function, most, variant.shared_bytes), name)
        self._functions[variant] = function
        return function


# The numbers of a kernel, as its source declares them.
TYPES: dict[str, tuple[type, ...]] = {
    "gemm": (ctypes.c_uint32, *[ctypes.c_int32] * 2, *[ctypes.c_int64] * 2, *[ctypes.c_int32] * 2),
    "decode": (ctypes.c_uint32, *[ctypes.c_int32] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_int32] * 3),
}


@cache
def gpu(index: int) -> CudaGpu:
    """The GPU of this number."""
    return CudaGpu(index)


@cache
def no_gpu() -> str | None:
    """Why the kernels cannot run on this machine's current GPU, or None."""
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and this torch is built without CUDA"
        return f"no CUDA GPU was found{built}: load the artifact on the CPU, or on a machine with an NVIDIA GPU"
    try:
        arch_of(torch.cuda.get_device_capability())
    except UsageError as error:
        return str(error)
    return unavailable()


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int32, device="cuda")


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


def _ok(result: tuple[Any, ...], kernel: str) -> Any:
    """What a call of the driver gave. Raises UsageError with the name of its error."""
    status, *values = result
    if int(status):
        raise UsageError(f"{kernel}: the CUDA driver refuses ({status.name}); {_OTHER_DRIVER}")
    return values[0] if values else None
