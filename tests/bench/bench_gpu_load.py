"""What loading for a GPU has to compile, and how long that takes: python tests/bench/bench_gpu_load.py

The kernels that any number of tokens may choose, for the layers of two models at 64:2:8 in bf16, compiled by NVRTC into
an empty cache and read from it again; no GPU is needed. Exit status 1 where the cache takes more than MOST of the time.
"""

from __future__ import annotations

import os
import tempfile
import time

import torch

from sparsec.backends.kernel.cuda import ahead, build
from sparsec.backends.kernel.cuda.ahead import Layer
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import Activation, Device
from sparsec.pattern import Pattern

MOST = 0.1
DEVICES = Device("sm_90a", 132, 232448), Device("sm_80", 108, 166912)
# Rows, cols, the activation behind, whether results lie by token.
MODELS: dict[str, list[tuple[int, int, Activation, bool]]] = {
    "MiniLM": [(384, 384, "none", True), (1536, 384, "gelu", False), (384, 1536, "none", True)],
    "Llama 8B": [
        (4096, 4096, "none", True), (1024, 4096, "none", True), (14336, 4096, "silu", False),
        (14336, 4096, "none", False), (4096, 14336, "none", True),
    ],
}  # fmt: skip


def main() -> int:
    if reason := build.unavailable():
        print(f"nothing measured: {reason}")
        return 0
    slow = False
    for name, shapes in MODELS.items():
        for device in DEVICES:
            forms = [(Form(Pattern.parse("64:2:8"), rows, cols), *how) for rows, cols, *how in shapes]
            wanted = ahead.variants_of([Layer(form, torch.bfloat16, *how) for form, *how in forms], [device])
            with tempfile.TemporaryDirectory() as cache:
                os.environ["XDG_CACHE_HOME"] = cache
                seconds = []
                for _ in range(2):
                    begun = time.perf_counter()
                    count = ahead.compile_all(wanted, device.arch)
                    seconds.append(time.perf_counter() - begun)
            slow = slow or seconds[1] > MOST * seconds[0]
            told = f"{count} kernels, {seconds[0]:.1f} s, then {1e3 * seconds[1]:.0f} ms from the cache"
            print(f"{name} {device.arch}: {told}")
    return int(slow)


if __name__ == "__main__":
    raise SystemExit(main())
