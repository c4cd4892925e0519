"""A CUDA driver that records what it is asked for, on a machine without one."""

from __future__ import annotations

import threading
import types
from typing import Any


class Result(int):
    name = "CUDA_ERROR_INVALID_IMAGE"


class Driver:
    """cuda.bindings.driver, as far as it is called, on a machine with GPUs. Its threads have a context, or not."""

    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUtensorMapDataType = types.SimpleNamespace(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16=9, CU_TENSOR_MAP_DATA_TYPE_FLOAT16=6)
    CUtensorMapInterleave = types.SimpleNamespace(CU_TENSOR_MAP_INTERLEAVE_NONE=0)
    CUtensorMapSwizzle = types.SimpleNamespace(CU_TENSOR_MAP_SWIZZLE_128B=3)
    CUtensorMapL2promotion = types.SimpleNamespace(CU_TENSOR_MAP_L2_PROMOTION_L2_256B=3)
    CUtensorMapFloatOOBfill = types.SimpleNamespace(CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE=0)
    cuuint32_t = cuuint64_t = int

    def __init__(self, refuses: bool = False) -> None:
        self.refuses, self.launches = Result(200 * refuses), []
        self.contexts: dict[int, int] = {}
        """By thread; the context of GPU 0 is 100."""
        self.loaded: list[tuple[int, bytes]] = []
        """Context and cubin."""
        self.finished: list[str] = []
        """Functions that wait for nothing any more."""

    def cuDeviceGet(self, index: int) -> tuple[Any, ...]:
        return Result(0), index

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:
        return Result(0), 100 + device

    def cuCtxGetCurrent(self) -> tuple[Any, ...]:
        return Result(0), self.contexts.get(threading.get_ident(), 0)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:
        self.contexts[threading.get_ident()] = context
        return (Result(0),)

    def cuModuleLoadData(self, cubin: bytes) -> tuple[Any, ...]:
        self.loaded.append((self.cuCtxGetCurrent()[1], cubin))
        return self.refuses, cubin

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> tuple[Any, ...]:
        return Result(0), name.decode()

    def cuFuncSetAttribute(self, *_: Any) -> tuple[Any, ...]:
        return (Result(0),)

    def cuFuncLoad(self, function: str) -> tuple[Any, ...]:
        self.finished.append(function)
        return (Result(0),)

    def cuTensorMapEncodeTiled(self, *arguments: Any) -> tuple[Any, ...]:
        return self.refuses, arguments

    def cuLaunchKernel(self, *arguments: Any) -> tuple[Any, ...]:
        self.launches.append(arguments)
        return (Result(0),)
