"""Inner loops keep their sums in registers: in memory the first kernels were 2 to 5 times slower, and as right."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from native.spills import inner_loops

from sparsec.backends.kernel.cpu import library

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump"
)

SAMPLE = """
#pragma GCC target("avx2,fma")
#include <immintrin.h>
"""
SUMS = """
extern "C" void NAME(const float* x, const float* weights, float* y, long steps) {
  __m256 sums[COUNT] = {};
  for (long s = 0; s < steps; ++s, x += 8) {
    const __m256 weight = _mm256_loadu_ps(weights + 8 * s);
#pragma GCC unroll UNROLLED
    for (int i = 0; i < COUNT; ++i) sums[i] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 64 * i), sums[i]);
  }
  for (int i = 0; i < COUNT; ++i) _mm256_storeu_ps(y + 8 * i, sums[i]);
}
"""


def test_no_inner_loop_moves_vectors_from_or_to_the_stack() -> None:
    if not library.supported():
        pytest.skip(library.unavailable_reason() or "no CPU kernels")
    loops = inner_loops(Path(library.library()._name))

    assert [] == [loop for loop in loops if loop.spills]
    for width in ("ymm", "zmm"):
        assert sum(loop.width == width for loop in loops) >= 8


def test_spills_are_found(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    samples = {"fits": (8, 32, False), "needs_more_registers": (20, 32, True), "found_by_running_address": (8, 1, True)}
    code = SAMPLE
    for name, (count, unrolled, _) in samples.items():
        code += SUMS.replace("NAME", name).replace("COUNT", str(count)).replace("UNROLLED", str(unrolled))
    (tmp_path / "sample.cpp").write_text(code)
    subprocess.run(["g++", "-std=c++17", "-O3", "-c", "sample.cpp"], cwd=tmp_path, check=True)
    found = {loop.function: bool(loop.spills) for loop in inner_loops(tmp_path / "sample.o")}

    assert {name: spills for name, (*_, spills) in samples.items()} == found
