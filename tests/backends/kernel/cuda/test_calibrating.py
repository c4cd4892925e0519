"""Ceilings are measured by programs that stay in bounds, compile for every GPU, and are read out as what they are."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import statistics
import types
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from native import cuda_fibers
from torch import Tensor

from sparsec.backends.kernel.cuda import ahead, build, calibrating, ceilings
from sparsec.backends.kernel.cuda.calibrating import Probe, Sizes, measure, places, random_panels, repeated
from sparsec.backends.kernel.cuda.driver import TYPES
from sparsec.backends.kernel.cuda.panels import Form, pack, unpack
from sparsec.backends.kernel.cuda.variants import Device
from sparsec.errors import UsageError
from sparsec.pattern import NM, VNM
from sparsec.pipeline import no_progress

SMALL = Sizes(128, 128, (1, 16, 64), repeats=10, memory_bytes=1 << 16, rotated_bytes=1 << 14)
CPU = torch.device("cpu")
needs_nvrtc = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
emulates = pytest.mark.skipif(cuda_fibers.missing() is not None, reason=str(cuda_fibers.missing()))


class Pretended:
    """A GPU that does nothing, and tells what it was asked for."""

    device = Device("sm_90a", 2, 232448)

    def __init__(self) -> None:
        self.asked: list[tuple[object, tuple[int, int], list[int]]] = []

    def launch(self, variant, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]) -> None:
        assert len(TYPES[variant.kernel]) == len(numbers)
        self.asked.append((variant, grid, list(numbers)))

    def tickets(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)


def a_millisecond(calls: Sequence[Callable[[], object]]) -> float:
    for call in calls:
        call()
    return 1e-3


def test_rates_are_what_was_done_in_the_time_it_took() -> None:
    gpu = Pretended()
    found = measure(gpu, "NVIDIA H200", CPU, 1 << 12, a_millisecond, SMALL, no_progress)
    blocks_of_mma = 2 * 16 * 10 * 16  # 2 thread blocks of 16 warps, 10 times 16 chains

    assert ("NVIDIA H200", "measured", gpu.device) == (found.gpu, found.basis, found.device)
    assert 1e3 * 2 * 16 * 8 * 32 * blocks_of_mma == pytest.approx(found.sparse_flops)
    assert 1e3 * 2 * 16 * 8 * 16 * blocks_of_mma == pytest.approx(found.mma_flops)
    assert dict.fromkeys((4, 5, 8, 16), 1000.0 * 8 * 512 * 10 * 2 * 16) == pytest.approx(found.gather_bytes)
    assert (1e3 * 50 * (1 << 12), 1e3 * (1 << 16)) == pytest.approx((found.l2_bytes, found.memory_bytes))
    assert 1e3 * 2 * 128 * 128 * 64 == pytest.approx(found.dense_flops) == found.two_of_four_flops
    assert 1e-5 == pytest.approx(found.launch_seconds)
    assert {"ceilings", "decode", "gemm"} == {variant.kernel for variant, *_ in gpu.asked}


def test_the_share_that_a_kernel_reached_is_its_roofline_over_its_time() -> None:
    found = measure(Pretended(), "GPU", CPU, 1 << 12, a_millisecond, SMALL, no_progress)
    plain = dataclasses.replace(found, reached={})
    expected = [calibrating.roofline.dense(plain, 128, 128, tokens) / 1e-3 for tokens in SMALL.tokens]

    assert statistics.geometric_mean(expected) == pytest.approx(found.reached["dense"])
    assert {"dense", "decode", "gemm"} == found.reached.keys()


def test_a_call_takes_the_median_round_over_its_calls_and_the_gpu_sleeps_meanwhile(monkeypatch) -> None:
    """Rounds of 6, 7, ... 15 milliseconds, of three calls."""
    log: list[str] = []
    taken = iter(range(6, 16))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return float(next(taken))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    found = calibrating.cuda_seconds([lambda: log.append("call")] * 3)

    assert 10.5e-3 / 3 == pytest.approx(found)
    assert ["call"] * 6 == log[:6]
    assert ["sleep", "record", "call", "call", "call", "record", "wait"] == log[6:13]


def test_arguments_are_those_of_the_source() -> None:
    parameters = re.search(r"\bceilings\(([^)]*)\)", build.sources("ceilings")["ceilings.cu"])[1].split(",")
    numbers = [one.split()[0] for one in parameters if "*" not in one]

    assert 3 == len(parameters) - len(numbers)
    assert ["int64_t", "int", "int"] == numbers
    assert (ctypes.c_int64, ctypes.c_int32, ctypes.c_int32) == TYPES["ceilings"]


def test_gathered_lines_are_four_of_every_m_and_of_all_there_are() -> None:
    for m in (4, 5, 8, 16):
        found = places(m).view(64, 8, 4).long() - m * torch.arange(8)[:, None]

        assert 0 <= int(found.min()) and int(found.max()) < m
        assert bool((found.diff() > 0).all())
        assert int(places(m).max()) < 256


def test_repeated_panels_are_those_of_the_repeated_weight() -> None:
    form, buffer = random_panels("64:2:8", 192, 100, CPU)
    whole = unpack(buffer, VNM(64, 2, 8), 192, 100, torch.bfloat16)
    first = pack(dataclasses.replace(
        whole, shape=(1, 64, 100), values=whole.values[:, :64], positions=whole.positions[:, :64],
        columns=whole.columns[:, :1],
    ), torch.bfloat16)  # fmt: skip

    assert Form(VNM(64, 2, 8), 192, 100) == form
    assert torch.equal(repeated(first, Form(VNM(64, 2, 8), 64, 100), form)[1], buffer)
    assert (130, 203) == unpack(random_panels("2:4", 130, 203, CPU)[1], NM(2, 4), 130, 203, torch.bfloat16).shape[1:]


@emulates
@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 2, 3, 4])
def test_programs_stay_in_bounds_and_read_all_they_are_given(limit: int) -> None:
    """Of the two that read memory, every thread gives its pieces together: all bits together are those of the input."""
    probe, blocks, repeats = Probe(limit), 2, 2
    data = torch.randn(1 << 13, generator=torch.Generator().manual_seed(0)).bfloat16()
    data = (data.view(torch.int16) & 255).view(torch.bfloat16) if limit > 2 else data  # floats hold the result
    program = cuda_fibers.build("ceilings", probe.macros)
    numbers = [blocks, 1, probe.shared_bytes, 0, data.nbytes // 16, repeats + (limit > 2), blocks]
    output = cuda_fibers.launch(program, numbers, [data, places(8)], torch.full((blocks * 512,), torch.nan))

    assert bool(torch.isfinite(output).all())
    if limit > 2:  # an odd number of rounds
        all_bits = 0
        for one in output.long().tolist():
            all_bits ^= one
        expected = 0
        for one in data.view(torch.int32).tolist():
            expected ^= one
        assert expected == all_bits


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_programs_compile_and_keep_what_they_measure(arch: str) -> None:
    expected = {0: "mma.sp::ordered_metadata", 1: "mma.sync", 2: "ldmatrix", 3: "ld.global.L1::no_allocate.v4"}
    for limit, instruction in expected.items():
        _, ptx, log = build.compile_kernel("ceilings", Probe(limit).macros, arch)

        assert instruction in ptx
        assert " 0 bytes spill stores" in log


def test_only_a_gpu_is_measured_and_its_table_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cuda: no CUDA GPU was found, and only a GPU can be measured"):
        calibrating.calibrate("cuda")
    found = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448, L2_cache_size=50 << 20
    )
    asked: list[tuple[object, ...]] = []
    compiled: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(calibrating, "unprepared", lambda: "the NVIDIA driver is too old")
    with pytest.raises(UsageError, match="cuda:0: the NVIDIA driver is too old"):
        calibrating.calibrate("cuda:0")
    monkeypatch.setattr(calibrating, "unprepared", lambda: None)
    measured = dataclasses.replace(ceilings.H200, basis="measured")
    monkeypatch.setattr(ahead, "cubin", lambda kernel, macros, arch: compiled.append((kernel, arch)))
    monkeypatch.setattr(calibrating, "measure", lambda *arguments: asked.append(arguments) or measured)

    assert measured == calibrating.calibrate("cuda:0") == ceilings.of_gpu(0)
    assert (25 << 20, Sizes()) == (asked[0][3], asked[0][5])
    assert {("ceilings", "sm_90a"), ("decode", "sm_90a")} <= set(compiled)


def test_a_shape_is_timed_on_other_copies_each_time() -> None:
    first = torch.zeros(1024, dtype=torch.uint8)
    found = calibrating.copies(first, 4096)

    assert 5 == len({one.data_ptr() for one in found})
    assert 64 == len(calibrating.copies(first, 1 << 20))
    assert ceilings.H200.basis == "model"
