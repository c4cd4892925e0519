"""Where the bench runs: a GPU, or the CPU in a rehearsal, which computes the same results and measures nothing."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsec import semi_structured
from sparsec.backends.kernel.cuda import calibrating, ceilings
from sparsec.backends.kernel.cuda.calibrating import Sizes
from sparsec.backends.kernel.cuda.ceilings import H200, Ceilings
from sparsec.backends.kernel.cuda.variants import Device
from sparsec.pipeline import no_progress

Call = Callable[[], Any]


class Machine(Protocol):
    """What measures."""

    name: str
    device: torch.device
    rehearses: bool

    def offers(self) -> Device:
        """What its thread blocks have."""

    def ceilings(self) -> Ceilings:
        """Its limits, measured."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """Median seconds of calls that take turns."""

    def graphed(self, call: Call) -> Call:
        """The call as a CUDA graph."""

    def compressed(self, weight: Tensor) -> Tensor | None:
        """A 2:4 weight for torch's 2:4 product; None where there is none."""

    def searched_2_4(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Call]:
        """torch's 2:4 products by the algorithm that its search finds for the first; none where there are none."""

    def facts(self) -> dict[str, str]:
        """What figures hold for."""


class Cuda:
    """The current GPU."""

    rehearses = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name()

    def offers(self) -> Device:
        return ceilings.device_of(self.device.index)

    def ceilings(self) -> Ceilings:
        return calibrating.calibrate(str(self.device))

    def seconds(self, calls: Sequence[Call]) -> float:
        return calibrating.cuda_seconds(calls, samples=30)

    def graphed(self, call: Call) -> Call:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles, loads, allocates
            call()
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def compressed(self, weight: Tensor) -> Tensor | None:
        if not torch.backends.cusparselt.is_available():
            return None
        return semi_structured.compressed("cuSPARSELt", weight)

    def searched_2_4(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Call]:
        if not torch.backends.cusparselt.is_available():
            return []
        packed = [torch._cslt_compress(weight) for weight in weights]
        lines = [x.t() for x in inputs]
        number = int(torch._cslt_sparse_mm_search(packed[0], lines[0], transpose_result=True))
        product = partial(torch._cslt_sparse_mm, transpose_result=True, alg_id=number)
        return [partial(product, one, lines[i % len(lines)]) for i, one in enumerate(packed)]

    def facts(self) -> dict[str, str]:
        library = torch.backends.cusparselt
        sparse = str(library.version()) if library.is_available() else "none"
        return {
            "gpu": self.name, "torch": torch.__version__, "cuda": str(torch.version.cuda), "cusparselt": sparse,
        }  # fmt: skip


class Rehearsal:
    """The CPU in the place of an H200: torch's dense product for its 2:4 one, no graphs, times of something else."""

    rehearses = True
    name = "CPU, in a rehearsal"
    device = torch.device("cpu")

    def offers(self) -> Device:
        return H200.device

    def ceilings(self) -> Ceilings:
        sizes = Sizes(128, 128, (1, 16, 64), repeats=1, memory_bytes=1 << 16, rotated_bytes=1 << 14)
        return calibrating.measure(Idle(), self.name, self.device, 1 << 12, self.seconds, sizes, no_progress)

    def seconds(self, calls: Sequence[Call]) -> float:
        begin = time.perf_counter()
        for call in calls[:2]:
            call()
        return (time.perf_counter() - begin) / len(calls[:2])

    def graphed(self, call: Call) -> Call:
        return call

    def compressed(self, weight: Tensor) -> Tensor | None:
        return weight

    def searched_2_4(self, weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Call]:
        return [partial(torch.nn.functional.linear, inputs[0], one) for one in weights]

    def facts(self) -> dict[str, str]:
        return {"gpu": self.name, "torch": torch.__version__, "processor": platform.machine()}


class Idle:
    """A GPU that does nothing: what calibrating asks of it is not computed."""

    device = H200.device

    def launch(self, *_: Any) -> None:
        return None

    def tickets(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)


def here(rehearses: bool) -> Machine:
    """The machine that was asked for."""
    return Rehearsal() if rehearses else Cuda()
