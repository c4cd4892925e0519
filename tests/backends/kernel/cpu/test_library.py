"""The level is the processor's best unless SPARSEC_ISA says otherwise, and inner loops keep sums in registers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sparsec.backends.kernel.cpu import library
from sparsec.errors import UsageError


def test_best_level_is_chosen_and_others_can_be_forced() -> None:
    assert library.supported()[-1] == library._choose("")[0]
    for level in library.supported():
        assert (level, "") == library._choose(level)
    assert library._choose("reference") == (None, "SPARSEC_ISA=reference turns the CPU kernels off")


def test_unknown_level_is_refused() -> None:
    with pytest.raises(UsageError, match="sse is not known; expected one of portable, avx2, avx512, reference"):
        library._choose("sse")


def test_level_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "supported", lambda: ("portable",))
    library._choose.cache_clear()
    with pytest.raises(UsageError, match="runs only portable"):
        library._choose("avx512")


def test_no_sum_is_spilled_in_an_inner_loop() -> None:
    # Accumulators in memory made the first kernels 2 to 5 times slower, without any wrong result to show it.
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    file = next(Path(library.__file__).parent.glob("_kernels*.so"))
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [f for f in text.split("\n\n") if re.match(r"[0-9a-f]+ <.*\b(tile|halves)<", f)]
    if not kernels:
        pytest.skip("the library was stripped: no function names to look for")

    spilled = [kernel.splitlines()[0] for kernel in kernels if _spills_in_a_loop(kernel)]
    assert spilled == []
    assert len(kernels) >= 20


def _spills_in_a_loop(function: str) -> bool:
    lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", function, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    start = code[0][0]
    loops = []
    for address, text in code:
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
        if jump and start <= int(jump[1], 16) < address:
            loops.append((int(jump[1], 16), address))
    return any(
        re.search(r"[yz]mm", text) and re.search(r"\(%r[sb]p\b", text) and any(a <= address <= b for a, b in loops)
        for address, text in code
    )
