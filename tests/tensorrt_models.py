"""A net that TensorRT-RTX builds in a fifth of a second, and what one needs to build it or to read its files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from models import made, random
from torch import Tensor, nn
from torch.nn import functional

import sparsec
from sparsec.program import Program
from sparsec.tracing import trace

GOLDEN = Path(__file__).parent / "golden" / "tensorrt"
DYNAMIC = {"x": {0: "batch", 1: "length"}}
needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed: pip install 'sparsec[rtx]'"
)
needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("polygraphy") is None, reason="polygraphy is not installed: pip install polygraphy"
)


class Wide(nn.Module):
    """x + down(gelu(up(x))), wider than the 256 that TensorRT's sparse kernels need."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(320, 512), nn.Linear(512, 320)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


def wide() -> nn.Module:
    return made(Wide)


def targeted(pattern: str) -> Program:
    """The net, traced, with a pattern for both of its sites."""
    program = trace(wide(), [random(2, 3, 320)], DYNAMIC)
    return program.replace(sites=program.sites.with_targets({"*": pattern}))


def compiled(out: Path, pattern: str, backend: str) -> sparsec.Artifact:
    """The net, pruned by magnitude and written by one backend."""
    return sparsec.compile(
        wide(),
        [random(2, 3, 320)],
        out=out,
        pattern=pattern,
        passes="mask | freeze",
        backends=[backend],
        dynamic=DYNAMIC,
        options=sparsec.Options(measure_speed=False),
    )
