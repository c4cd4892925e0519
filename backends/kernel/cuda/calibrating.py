"""Measure the ceilings of a GPU, and how near its kernels come to them: about half a minute, most of it compiling.

1. Each ceiling is a program of ceilings.cu, or a torch kernel, that needs nothing else; the median of several launches.
2. Every kernel is timed on large weights with few and with many tokens; calls rotate through copies of their weights,
   so that none is found in a cache. The geometric mean of roofline over measured seconds is the share it reached.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from sparsec import semi_structured
from sparsec.backends.kernel.cuda import ceilings, roofline
from sparsec.backends.kernel.cuda.ahead import compile_all
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.backends.kernel.cuda.driver import Gpu, Variant, gpu, unprepared
from sparsec.backends.kernel.cuda.linear import run
from sparsec.backends.kernel.cuda.panels import Form, pack, unpack
from sparsec.backends.kernel.cuda.variants import MOST_DECODED, Activation, Device, common_macros, decode, gemm
from sparsec.backends.kernel.measuring import random_selection
from sparsec.errors import UsageError
from sparsec.layout import compress, decompress
from sparsec.pattern import NM, Pattern, SharedColumns
from sparsec.pipeline import Progress, no_progress

Clock = Callable[[Sequence[Callable[[], object]]], float]
"""Median seconds of calls that take turns."""
_MMA_SP, _MMA, _GATHER, _L2, _MEMORY = range(5)  # LIMIT in ceilings.cu
_GATHERED = (4, 5, 8, 16)
_CLOCK = 2e9  # of a GPU, at most or not much below
_PATTERNS = ("2:4", "64:2:5", "64:2:8", "64:2:16")


@dataclass(frozen=True)
class Probe:
    """A program of ceilings.cu."""

    limit: int
    kernel: str = field(default="ceilings", init=False)
    threads: int = field(default=512, init=False)
    shared_bytes: int = field(default=256 * 128, init=False)

    @property
    def macros(self) -> dict[str, int]:
        form = Form(NM(2, 4), 64, 64)
        return common_macros(form, torch.bfloat16, "none") | {"TOKENS": 8, "STAGES": 1, "LIMIT": self.limit}


class Rates(TypedDict):
    """What ceilings.cu measures; fields of `Ceilings`."""

    sparse_flops: float
    mma_flops: float
    gather_bytes: dict[int, float]
    l2_bytes: float
    memory_bytes: float


@dataclass(frozen=True)
class Sizes:
    """How much is measured; a rehearsal takes less."""

    rows: int = 8192
    cols: int = 4096
    tokens: tuple[int, ...] = (1, 16, 512, 4096)
    repeats: int = 4000
    memory_bytes: int = 2 << 30
    rotated_bytes: int = 256 << 20


def calibrate(device: str, progress: Progress = no_progress) -> Ceilings:
    """Measure a GPU of this machine and keep its table. Raises UsageError where it cannot."""
    if not torch.cuda.is_available():
        raise UsageError(f"{device}: no CUDA GPU was found, and only a GPU can be measured; calibrate where it is")
    index = ceilings.index_of(device)
    if reason := unprepared():
        raise UsageError(f"{device}: {reason}")
    with torch.cuda.device(index), torch.inference_mode():
        compile_all(kernels(ceilings.device_of(index), Sizes()), ceilings.device_of(index).arch, progress)
        name, l2 = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).L2_cache_size
        table = measure(gpu(index), name, torch.device("cuda", index), l2 // 2, cuda_seconds, Sizes(), progress)
    ceilings.write(ceilings.cache_file(name, ceilings.device_of(index)), table)
    return table


def kernels(device: Device, sizes: Sizes) -> Iterator[Variant]:
    """All that calibrating runs."""
    yield from (Probe(limit) for limit in range(5))
    for text, tokens in itertools.product(_PATTERNS, sizes.tokens):
        yield chosen(Form(_pattern(text), sizes.rows, sizes.cols), tokens, device)


def chosen(form: Form, tokens: int, device: Device, activation: Activation = "none", by_token: bool = True) -> Variant:
    """What multiplies so many tokens."""
    if tokens <= MOST_DECODED and form.window:
        return decode(form, roofline.DTYPE, tokens, device, activation)
    return gemm(form, roofline.DTYPE, tokens, device, activation, by_token)


def measure(
    on: Gpu, name: str, device: torch.device, l2_bytes: int, clock: Clock, sizes: Sizes, progress: Progress
) -> Ceilings:
    """The ceilings of `on`, whose tensors live on `device`; `l2_bytes` fit its L2 cache."""
    progress("measuring ceilings", 0, 3)
    rates = _rates(on, device, l2_bytes, clock, sizes)
    progress("measuring torch", 1, 3)
    weight = torch.randn(sizes.rows, sizes.cols, device=device).to(roofline.DTYPE) / sizes.cols**0.5
    launch = _launch_seconds(device, clock)
    timed = dict(_dense(weight, clock, sizes))
    sparse = dict(_two_of_four(weight, clock, sizes)) if device.type == "cuda" else {}
    most, least = max(sizes.tokens), min(sizes.tokens)
    products = 2 * sizes.rows * sizes.cols * most
    made = Ceilings(
        name, "measured", on.device, dense_flops=products / timed[most], launch_seconds=launch,
        two_of_four_flops=products / (sparse or timed)[most],
        two_of_four_bytes=1.125 * sizes.rows * sizes.cols / (sparse or timed)[least], **rates,
    )  # fmt: skip
    progress("measuring kernels", 2, 3)
    return dataclasses.replace(made, reached=_reached(made, on, device, timed, sparse, clock, sizes))


def cuda_seconds(calls: Sequence[Callable[[], object]], samples: int = 10) -> float:
    """The clock of the current GPU, which sleeps until a whole round of calls is queued: none waits for Python."""
    for call in calls[:3]:  # compiles, loads, allocates
        call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for call in calls:
        call()
    queued = time.perf_counter() - begin
    taken: list[float] = []
    for _ in range(samples):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(_CLOCK * (2 * queued + 2e-4)))
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(taken)


def _rates(on: Gpu, device: torch.device, l2_bytes: int, clock: Clock, sizes: Sizes) -> Rates:
    """Rule 1."""
    processors, threads, repeats = on.device.multiprocessors, Probe(0).threads, sizes.repeats
    numbers = torch.randn(1 << 20, device=device).to(roofline.DTYPE)
    output = torch.empty(2 * processors * threads, device=device)
    memory = torch.empty(sizes.memory_bytes, dtype=torch.uint8, device=device)

    def seconds(limit: int, data: Tensor, places: Tensor | None, times: int, blocks: int = processors) -> float:
        given = [data.nbytes // 16, times, blocks]
        return clock([lambda: on.launch(Probe(limit), (blocks, 1), [data, places, output], given)])

    warps = processors * threads // 32
    products = 2 * 16 * 8 * 32 * 16 * repeats * warps  # of 16 x 8 sums over 32 columns, 16 at a time
    gathered = 8 * 512 * repeats * warps
    return {
        "sparse_flops": products / seconds(_MMA_SP, numbers, None, repeats),
        "mma_flops": products / 2 / seconds(_MMA, numbers, None, repeats),
        "gather_bytes": {m: gathered / seconds(_GATHER, numbers, places(m, device), repeats) for m in _GATHERED},
        "l2_bytes": 50 * l2_bytes / seconds(_L2, memory[:l2_bytes], None, 50, 2 * processors),
        "memory_bytes": sizes.memory_bytes / seconds(_MEMORY, memory, None, 1, 2 * processors),
    }


def places(m: int, device: torch.device | None = None) -> Tensor:
    """64 sets of 32 lines, 4 of every M, as a step's window has them; uint8."""
    generator = torch.Generator().manual_seed(m)
    chosen = torch.rand(64, 8, m, generator=generator).topk(4).indices.sort().values
    return (chosen + m * torch.arange(8)[:, None]).flatten().to(torch.uint8).to(device)


def _launch_seconds(device: torch.device, clock: Clock) -> float:
    """Of the smallest kernel, a hundred in a CUDA graph."""
    one = torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            one.add_(1)

    if device.type != "cuda":
        return clock([hundred]) / 100
    hundred()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hundred()
    return clock([graph.replay]) / 100


def _dense(weight: Tensor, clock: Clock, sizes: Sizes) -> Iterable[tuple[int, float]]:
    """Tokens -> seconds of torch's dense product."""
    weights = copies(weight, sizes.rotated_bytes)
    for tokens in sizes.tokens:
        x = _activations(weight, tokens)
        yield tokens, clock([partial(torch.nn.functional.linear, x, one) for one in weights])


def _two_of_four(weight: Tensor, clock: Clock, sizes: Sizes) -> Iterable[tuple[int, float]]:
    """Tokens -> seconds of torch's 2:4 product; nothing where this torch has none."""
    if not torch.backends.cusparselt.is_available():
        return
    pruned = random_weight("2:4", sizes.rows, sizes.cols)[1].to(weight.device)
    weights = [semi_structured.compressed("cuSPARSELt", one) for one in copies(pruned, sizes.rotated_bytes)]
    for tokens in sizes.tokens:
        x = _activations(weight, tokens)
        yield tokens, clock([partial(semi_structured.semi_structured_linear, x, one, None) for one in weights])


def _reached(
    made: Ceilings, on: Gpu, device: torch.device, dense: dict[int, float], sparse: dict[int, float], clock: Clock,
    sizes: Sizes,
) -> dict[str, float]:  # fmt: skip
    """Rule 2."""
    shares: dict[str, list[float]] = {}

    def add(kernel: str, expected: float, found: float) -> None:
        shares.setdefault(kernel, []).append(expected / found)

    shape = (sizes.rows, sizes.cols)
    for tokens, found in dense.items():
        add("dense", roofline.dense(made, *shape, tokens), found)
    for tokens, found in sparse.items():
        add("cuSPARSELt", roofline.two_of_four(made, *shape, tokens), found)
    for text in _PATTERNS:
        form, packed = random_panels(text, *shape, device)
        buffers = copies(packed, sizes.rotated_bytes)
        for tokens in sizes.tokens:
            x = _activations(packed.new_empty(shape, dtype=roofline.DTYPE), tokens)
            found = clock([partial(run, x, one, None, sizes.rows, text, "none", True, on) for one in buffers])
            add(chosen(form, tokens, on.device).kernel, roofline.panels(made, form, tokens), found)
    return {kernel: statistics.geometric_mean(each) for kernel, each in shares.items()}


def random_panels(text: str, rows: int, cols: int, device: torch.device, strips: int = 1) -> tuple[Form, Tensor]:
    """The panels of random weights; the rows of so many strips are made and repeated, which no kernel can tell."""
    pattern = _pattern(text)
    few = min(rows, strips * math.lcm(64, pattern.v if isinstance(pattern, SharedColumns) else 1))
    weight = torch.randn(1, few, cols).to(roofline.DTYPE) / cols**0.5
    packed = pack(compress(weight, pattern, random_selection(pattern, weight.abs().float())), roofline.DTYPE).to(device)
    return repeated(packed, Form(pattern, few, cols), Form(pattern, rows, cols))


def random_weight(text: str, rows: int, cols: int, strips: int = 1) -> tuple[Tensor, Tensor]:
    """Random panels and the dense weight that they hold, in bf16, on the CPU."""
    form, panels = random_panels(text, rows, cols, torch.device("cpu"), strips)
    return panels, decompress(unpack(panels, form.pattern, rows, cols, roofline.DTYPE), roofline.DTYPE)[0]


def _pattern(text: str) -> NM | SharedColumns:
    pattern = Pattern.parse(text)
    assert isinstance(pattern, (NM, SharedColumns))
    return pattern


def repeated(packed: Tensor, few: Form, many: Form) -> tuple[Form, Tensor]:
    """The panels of `few` again and again, until there are those of `many`."""
    buffer, times = packed.new_empty(many.nbytes), math.ceil(many.panels / few.panels)
    for name, table in few.tables(packed).items():
        to = many.tables(buffer)[name]
        to.copy_(table.repeat(times)[: to.numel()])
    return many, buffer


def copies(first: Tensor, nbytes: int) -> list[Tensor]:
    """A tensor and as many copies as fill `nbytes`, at most 64."""
    return [first, *(first.clone() for _ in range(min(63, nbytes // first.nbytes)))]


def _activations(weight: Tensor, tokens: int) -> Tensor:
    return torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
