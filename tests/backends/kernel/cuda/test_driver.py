"""What reaches the CUDA driver: the right kernel, once loaded, its arguments as the source declares them."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native import cuda_fibers
from native.gpu_kernels import case
from native.recording import Driver, Result

from sparsec.backends.kernel.cuda import driver
from sparsec.backends.kernel.cuda.linear import run
from sparsec.backends.kernel.cuda.panels import pack
from sparsec.errors import UsageError

C_TYPES = {"uint32_t": ctypes.c_uint32, "int": ctypes.c_int32, "int64_t": ctypes.c_int64}


def declared(kernel: str) -> tuple[int, list[type]]:
    """How many pointers and maps a kernel's source takes, then the types of its numbers."""
    text = (cuda_fibers.SOURCES / f"{kernel}.cu").read_text()
    parameters = re.search(rf"\b{kernel}\(([^)]*)\)", text)[1].split(",")
    numbers = [C_TYPES[one.split()[0]] for one in parameters if one.split()[0] in C_TYPES]
    return len(parameters) - len(numbers), numbers


def launched(make_layout, cuda: Driver, tokens: int, gpu: driver.CudaGpu) -> tuple[Any, ...]:
    layout, x, bias = case(make_layout, "64:2:8", 70, 2080, tokens)
    run(x, pack(layout, torch.bfloat16), bias, 70, "64:2:8", "none", True, gpu)
    return cuda.launches[-1]


def small_gpu() -> driver.CudaGpu:
    """One processor, which a few thread blocks of window.cu fill."""
    gpu = driver.CudaGpu(0)
    gpu.device = dataclasses.replace(gpu.device, multiprocessors=1)
    return gpu


@pytest.mark.parametrize(("kernel", "tokens"), [("gemm", 40), ("decode", 3), ("window", 40)])
def test_arguments_are_those_of_the_source(make_layout, cuda: Driver, kernel: str, tokens: int) -> None:
    gpu = small_gpu() if kernel == "window" else driver.CudaGpu(0)
    function, *shape, stream, (values, types), extra = launched(make_layout, cuda, tokens, gpu)
    pointers, numbers = declared(kernel)

    assert (kernel, 77, 0) == (function, stream, extra)
    tensors = [ctypes.c_void_p] * pointers
    if kernel == "window":
        tensors[4], values = None, (*values[:4], values[4][2], *values[5:])  # a map; the address in it
    assert (*tensors, *numbers) == types
    assert len(types) == len(values) and all(isinstance(value, int) for value in values)
    assert shape[2] == shape[4] == shape[5] == 1 and shape[6] <= 232448
    assert 0 == values[3] and all(values[:3])  # no table of rows


def test_a_map_tells_where_the_activations_are(make_layout, cuda: Driver) -> None:
    *_, ((*_, x, _, _, rows, cols, tokens, stride, _, _, _), _), _ = launched(make_layout, cuda, 300, small_gpu())
    dtype, rank, address, sizes, strides, box, steps, *modes = x

    assert (9, 2, [300, 2080], [608], [1, 1], [0, 3, 3, 0]) == (dtype, rank, sizes, strides, steps, modes)
    assert [64, 128] == box  # one row of thread blocks: each copies all lines of its window
    assert 0 == address % 16
    assert (70, 2080, 300, 304) == (rows, cols, tokens, stride)


def test_a_kernel_is_loaded_once_and_counters_are_kept_by_stream(make_layout, cuda: Driver, monkeypatch) -> None:
    gpu = driver.CudaGpu(0)
    first, second = launched(make_layout, cuda, 3, gpu), launched(make_layout, cuda, 3, gpu)

    assert [(100, b"decode sm_90a")] == cuda.loaded and ["decode"] == cuda.finished
    assert first[-2][0][7] == second[-2][0][7] == gpu.tickets(1).data_ptr()
    assert 5000 == len(gpu.tickets(5000))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.tickets(1).data_ptr() != gpu.tickets(1).data_ptr()


@pytest.mark.parametrize("index", [0, 1])
def test_a_thread_of_its_own_gets_the_context_of_its_gpu(make_layout, cuda: Driver, index: int) -> None:
    """torch's allocator may have given a new thread all it needs without a call that makes a context current."""
    gpu = driver.CudaGpu(index)
    launched(make_layout, cuda, 3, gpu)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(launched, make_layout, cuda, 3, gpu).result()
    cuda.contexts[threading.get_ident()] = 7  # somebody's own
    launched(make_layout, cuda, 3, gpu)

    assert [100 + index, 7] == sorted(set(cuda.contexts.values()), reverse=True)
    assert 2 == len(cuda.contexts) and 3 == len(cuda.launches) and 1 == len(cuda.loaded)


def test_a_driver_that_is_too_old_is_told(make_layout, cuda: Driver) -> None:
    cuda.refuses = Result(200)
    for tokens, gpu in ((3, driver.CudaGpu(0)), (40, small_gpu())):
        with pytest.raises(UsageError, match=r"refuses \(CUDA_ERROR_INVALID_IMAGE\); update the NVIDIA driver"):
            launched(make_layout, cuda, tokens, gpu)
