"""The kernel tests pass on a library that stops at memory errors, and on one that needs no AVX-512 for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from native.build import ROOT, VARIANTS, Variant, build, environment, missing

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


SWEEP = """
import sys, pathlib, pytest
from sparsec.oneshot import native

native._FOLDER = pathlib.Path(sys.argv[1])
if sys.argv[2] == "overrun":
    import torch
    print("fits", flush=True)
    native.turned([torch.zeros(40, 8)], torch.arange(9))  # a column more than there is
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/core/oneshot/test_sweep.py", "-k", "residue"]))
"""


@pytest.mark.slow
def test_the_sweep_touches_no_memory_but_its_own(tmp_path: Path) -> None:
    if reason := missing("sanitized"):
        pytest.skip(reason)
    shutil.copy(build("sanitized", "_sweep"), tmp_path / "_sweep.so")
    fine = run_python("sanitized", "-c", SWEEP, str(tmp_path), "tests")
    broken = run_python("sanitized", "-c", SWEEP, str(tmp_path), "overrun")

    assert fine.returncode == 0, (fine.stdout + fine.stderr)[-8000:]
    assert "24 passed" in fine.stdout
    assert "fits\n" == broken.stdout
    assert "heap-buffer-overflow" in broken.stderr
