"""Load compiled kernels and launch them, through the CUDA driver, in torch's context and on its current stream.

What layers may launch is loaded ahead (`ahead`), into each GPU that they are on. A kernel that nobody foresaw is
compiled and loaded when it first runs; that a CUDA graph cannot capture, so it is refused there.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsec.backends.kernel.cuda.build import arch_of, cubin, cuda_version, unavailable
from sparsec.backends.kernel.cuda.variants import Device, Window
from sparsec.errors import UsageError

_OTHER_DRIVER = "update the NVIDIA driver, or install cuda-bindings and nvidia-cuda-nvrtc of the CUDA version it has"
_CONTEXT = "the GPU kernels"

_TICKETS = 1024  # enough for 65536 rows

log = logging.getLogger("sparsec")
Program = tuple[str, tuple[tuple[str, int], ...]]
"""A source and its macros: what is compiled. Many variants are the same program, of weights of other sizes."""


class Variant(Protocol):
    """A kernel with its macros, and what a thread block of it takes; hashable."""

    @property
    def kernel(self) -> str:
        """Its source's name, and its function's."""

    @property
    def macros(self) -> Mapping[str, int]:
        """What specialises the source."""

    @property
    def threads(self) -> int:
        """Of a thread block."""

    @property
    def shared_bytes(self) -> int:
        """Of a thread block."""


def program_of(variant: Variant) -> Program:
    """What has to be compiled for a variant."""
    return variant.kernel, tuple(sorted(variant.macros.items()))


class Gpu(Protocol):
    """What runs a variant; tests put the emulation in its place."""

    @property
    def device(self) -> Device:
        """What it offers."""

    def launch(
        self, variant: Variant, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]
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
        self._functions: dict[Variant, Any] = {}
        self._programs: dict[Program, Any] = {}
        self._context: Any = None

    def load(self, variants: Iterable[Variant]) -> None:
        """Load kernels, which are compiled where the cache has them not, so that no launch of theirs has to."""
        with torch.cuda.device(self.index):
            for variant in variants:
                if variant not in self._functions:
                    self._load(variant)

    def launch(
        self, variant: Variant, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]
    ) -> None:
        with torch.cuda.device(self.index):  # torch makes its context the current one
            function = self._functions.get(variant) or self._unforeseen(variant)
            values: list[Any] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
            types: list[type | None] = [ctypes.c_void_p] * len(values)
            if isinstance(variant, Window):  # takes a map for x; its size and stride are the numbers after the rows
                values[4] = tensor_map(values[4], *numbers[1:4], variant.lines, variant.dtype)
                types[4] = None
            stream = torch.cuda.current_stream().cuda_stream
            self._enter()
            _ok(
                _driver().cuLaunchKernel(
                    function, *grid, 1, variant.threads, 1, 1, variant.shared_bytes, stream,
                    ((*values, *numbers), (*types, *TYPES[variant.kernel])), 0,
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

    def _enter(self) -> None:
        """Make torch's context this thread's where it has none yet: torch does so only once it needs it itself."""
        driver = _driver()
        if int(_ok(driver.cuCtxGetCurrent(), _CONTEXT)):
            return
        if self._context is None:
            self._context = _ok(
                driver.cuDevicePrimaryCtxRetain(_ok(driver.cuDeviceGet(self.index), _CONTEXT)), _CONTEXT
            )
        _ok(driver.cuCtxSetCurrent(self._context), _CONTEXT)

    def _unforeseen(self, variant: Variant) -> Any:
        """The safe path: a launch that `ahead` did not load for."""
        if program_of(variant) not in self._programs:
            if torch.cuda.is_current_stream_capturing():
                raise UsageError(
                    f"{variant.kernel}: a kernel that was not loaded yet cannot be captured in a CUDA graph: run the "
                    "same sizes once before capturing"
                )
            log.info("%s for %s is loaded at its first launch", variant.kernel, self.device.arch)
        return self._load(variant)

    def _load(self, variant: Variant) -> Any:
        program, name = program_of(variant), variant.kernel
        if program not in self._programs:
            driver, compiled = _driver(), cubin(name, variant.macros, self.device.arch)
            self._enter()
            module = _ok(driver.cuModuleLoadData(compiled), name)
            function = _ok(driver.cuModuleGetFunction(module, name.encode()), name)
            most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _ok(driver.cuFuncSetAttribute(function, most, variant.shared_bytes), name)
            _ok(driver.cuFuncLoad(function), name)  # the driver would otherwise wait with it until the first launch
            self._programs[program] = function
        self._functions[variant] = self._programs[program]
        return self._programs[program]


@lru_cache(maxsize=1024)
def tensor_map(pointer: int, cols: int, tokens: int, stride: int, lines: int, dtype: torch.dtype) -> Any:
    """How the accelerator finds boxes of 64 tokens and some lines in x [cols][tokens]: swizzled, zeros beyond it.

    Its demands on alignment, lines that begin at multiples of 16 bytes, are gemm.cu's too. Raises UsageError where the
    driver refuses.
    """
    driver = _driver()
    number = driver.CUtensorMapDataType
    types = {
        torch.bfloat16: number.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: number.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
    }
    result = driver.cuTensorMapEncodeTiled(
        types[dtype], 2, pointer, [driver.cuuint64_t(size) for size in (tokens, cols)], [driver.cuuint64_t(2 * stride)],
        [driver.cuuint32_t(size) for size in (64, lines)], [driver.cuuint32_t(1)] * 2,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    return _ok(result, "window")


# The numbers of a kernel, as its source declares them.
_MANY = (ctypes.c_uint32, *[ctypes.c_int32] * 2, *[ctypes.c_int64] * 2, *[ctypes.c_int32] * 2)
TYPES: dict[str, tuple[type, ...]] = {
    "gemm": _MANY,
    "window": _MANY,
    "decode": (ctypes.c_uint32, *[ctypes.c_int32] * 2, *[ctypes.c_int64] * 3, *[ctypes.c_int32] * 3),
    "ceilings": (ctypes.c_int64, *[ctypes.c_int32] * 2),
}


@cache
def gpu(index: int) -> CudaGpu:
    """The GPU of this number."""
    return CudaGpu(index)


def cannot_run() -> str | None:
    """Why the kernels cannot run on this machine's current GPU, or None."""
    return no_gpu() or too_old(torch.cuda.current_device()) or unprepared()


def no_gpu() -> str | None:
    """Why torch finds no GPU on this machine, or None."""
    if torch.cuda.is_available():
        return None
    elsewhere = "load the artifact on the CPU, or on a machine with an NVIDIA GPU"
    if not torch.version.cuda:
        return f"no CUDA GPU was found, and this torch is built without CUDA: {elsewhere}"
    try:
        torch.cuda.init()
        why = "torch says nothing more"
    except RuntimeError as error:  # torch's reason: a driver that is too old, or none
        why = " ".join(str(error).split()).partition(". ")[0]
    return f"no CUDA GPU was found ({why}): install or update the NVIDIA driver where there is one, {elsewhere}"


def too_old(index: int) -> str | None:
    """Why none of the kernels can run on a GPU, whatever is installed, or None."""
    try:
        arch_of(torch.cuda.get_device_capability(index))
    except UsageError as error:
        return str(error)
    return None


@cache
def unprepared() -> str | None:
    """What must be installed before kernels can be compiled and loaded here, or None.

    A driver loads what its own major version of CUDA, or an older one, compiles.
    """
    if reason := unavailable():
        return reason
    has, (major, minor) = _ok(_driver().cuDriverGetVersion(), _CONTEXT), cuda_version()
    if has // 1000 >= major:
        return None
    return (
        f"the NVIDIA driver is too old: it has CUDA {has // 1000}.{has % 1000 // 10}, and the GPU kernels are compiled "
        f"for CUDA {major}.{minor}; {_OTHER_DRIVER}"
    )


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
