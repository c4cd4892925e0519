"""The kernel tests pass on a library that stops at memory errors, and on one that needs no AVX-512 for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from native.build import ROOT, VARIANTS, Variant, environment, missing

TESTS = "tests/backends/kernel/cpu"
OVERRUN = """
import sys, torch
from sparsec.backends.kernel.cpu.linear import run
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.layout import compress
from sparsec.pattern import Pattern

pattern, weight = Pattern.parse("2:4"), torch.randn(1, 16, 40)
stream = pack(compress(weight, pattern, pattern.project(weight.abs(), "l1")))
x, bias = torch.randn(3, 40), torch.zeros(16)
run(x, stream, bias, 16, 1, sys.argv[1])
print("fits", flush=True)
bias.untyped_storage().resize_(15 * 4)
run(x, stream, bias, 16, 1, sys.argv[1])
"""


def run_python(variant: Variant, *arguments: str) -> subprocess.CompletedProcess[str]:
    reason = missing(variant)
    if reason:
        pytest.skip(reason)
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "SPARSEC_"))}
    env = {**outside, **environment(variant), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_kernel_tests_pass(variant: Variant) -> None:
    tests = (
        [TESTS, "-k", "not portable"] if variant == "emulated" else [TESTS]
    )  # the portable level is the same in both
    child = run_python(variant, "-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", *tests)

    assert child.returncode == 0, (child.stdout + child.stderr)[-8000:]
    assert "AddressSanitizer" not in child.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "level"), [("sanitized", "portable"), ("emulated", "avx2"), ("emulated", "avx512")]
)
def test_an_access_outside_a_tensor_is_found(variant: Variant, level: str) -> None:
    child = run_python(variant, "-c", OVERRUN, level)

    assert child.stdout == "fits\n"
    assert "heap-buffer-overflow" in child.stderr
