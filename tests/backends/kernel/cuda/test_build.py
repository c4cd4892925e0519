"""Every variant compiles for every GPU without one, keeps its sums in registers, and is compiled once."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from native import sass

from sparsec.backends.kernel.cuda import build, variants
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import ACTIVATIONS, Decode, Device, Gemm, Window, decode, gemm, splits
from sparsec.errors import UsageError
from sparsec.pattern import Pattern

needs_nvrtc = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
ARCHS = ("sm_80", "sm_90a", "sm_100a")
PATTERNS = (
    "2:4",
    "64:2:5",
    "64:2:8",
    "128:2:8",
    "64:2:16",
    "32:2:8",
    "16:2:6",
    "64:2:20",
    "64:2:5@strip",
    "16:2:8@strip",
)


def chosen(arch: str, patterns: tuple[str, ...] = PATTERNS) -> list[Gemm | Decode]:
    """Variants that a GPU of this arch runs: of each pattern one for more and one for few tokens, on Hopper another
    for many."""
    device, found = Device(arch, 132, SHARED[arch]), []
    for number, pattern in enumerate(patterns):
        form = Form(Pattern.parse(pattern), 4096, 4096, moved="strip" in pattern)
        dtype, activation = (torch.bfloat16, torch.float16)[number % 2], ACTIVATIONS[number % 5]
        many, few = ((1000, 1), (200, 16), (40, 32))[number % 3]
        found.append(gemm(form, dtype, many, device, activation, by_token=bool(number % 3)))
        window = gemm(form, dtype, 4096, device, activation, by_token=bool(number % 2))
        found += [window] if isinstance(window, Window) else []
        if form.window:
            found.append(decode(form, dtype, few, device, activation))
    return found


def check(one: Gemm | Decode, arch: str) -> None:
    cubin, ptx, log = build.compile_kernel(one.kernel, one.macros, arch)
    spilled = [int(found) for found in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)]
    registers = int(re.search(r"Used (\d+) registers", log)[1])

    assert cubin[:4] == b"\x7fELF"
    assert "setmaxnreg" not in log, "registers do not move between warps"
    assert [0, 0, 0] == spilled, one
    assert registers * one.threads <= 65536, one
    assert products_of(one) == ptx.count("mma.sp::ordered_metadata") == ptx.count("mma."), one


def products_of(one: Gemm | Decode) -> int:
    """Sparse products of a step, which is unrolled."""
    tiles = one.tile if isinstance(one, Gemm) else one
    return 2 * 4 * tiles.panels * (tiles.tokens // (8 * getattr(tiles, "warps_n", 1)))


@needs_nvrtc
def test_each_kernel_compiles_for_hopper() -> None:
    found = chosen("sm_90a", ("64:2:8",))
    for one in found:
        check(one, "sm_90a")
    assert ["gemm", "window", "decode"] == [one.kernel for one in found]


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_pattern_compiles_without_spills(arch: str) -> None:
    for one in chosen(arch):
        check(one, arch)


@needs_nvrtc
@pytest.mark.skipif(not sass.disassembler(), reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize(
    ("arch", "patterns"),
    [("sm_90a", ("64:2:8",)), *(pytest.param(arch, PATTERNS, marks=pytest.mark.slow) for arch in ARCHS)],
)
def test_machine_code_has_all_sparse_products_no_dense_one_and_no_local_memory(arch: str, patterns: tuple) -> None:
    for one in chosen(arch, patterns):
        code = sass.instructions(build.compile_kernel(one.kernel, one.macros, arch).cubin)
        sparse = sum("HMMA.SP.16832.F32" in instruction for instruction in code)

        assert sparse == sum("MMA" in instruction for instruction in code) >= products_of(one), one
        assert sparse == products_of(one) or one.kernel == "decode", one  # whose loop the assembler splits
        assert not [instruction for instruction in code if re.search(r"\b(LDL|STL)\b", instruction)], one


@needs_nvrtc
def test_a_kernel_is_compiled_once_and_a_damaged_one_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compile_kernel", lambda *_: calls.append(1) or build.Compiled(b"cubin", "", ""))
    calls: list[int] = []
    macros = {"WINDOW": 8}
    first = [build.cubin("gemm", macros, "sm_90a") for _ in range(2)]
    file = build.cache_file("gemm", macros, "sm_90a")
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    assert [b"cubin", b"cubin", b"cubin"] == [*first, build.cubin("gemm", macros, "sm_90a")]
    assert 2 == len(calls)
    assert not list(file.parent.glob("*.tmp"))
    others = {build.cache_file("decode", macros, "sm_90a"), build.cache_file("gemm", {"WINDOW": 5}, "sm_90a")}
    assert 4 == len(others | {file, build.cache_file("gemm", macros, "sm_80")})


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "sparsec").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "compile_kernel", lambda *_: build.Compiled(b"cubin", "", ""))

    assert b"cubin" == build.cubin("gemm", {}, "sm_90a")


@needs_nvrtc
def test_what_the_compiler_says_is_told() -> None:
    with pytest.raises(UsageError, match=r"gemm.cu does not compile for sm_90a: .*PANELS"):
        build.compile_kernel("gemm", {}, "sm_90a")


def test_without_nvrtc_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    build.unavailable.cache_clear()
    try:
        with pytest.raises(UsageError, match=r"pip install 'sparsec\[cuda\]'"):
            build.compile_kernel("gemm", {}, "sm_90a")
    finally:
        build.unavailable.cache_clear()


def test_gpus_have_their_names() -> None:
    assert ["sm_80", "sm_89", "sm_90a", "sm_100a"] == [build.arch_of(one) for one in ((8, 0), (8, 9), (9, 0), (10, 0))]
    with pytest.raises(UsageError, match=r"compute capability 7.5"):
        build.arch_of((7, 5))


def test_window_is_chosen_on_hopper_where_thread_blocks_fill_it() -> None:
    hopper, form = Device("sm_90a", 132, SHARED["sm_90a"]), Form(Pattern.parse("64:2:8"), 4096, 4096)
    assert ["gemm", "window"] == [gemm(form, torch.bfloat16, tokens, hopper).kernel for tokens in (1000, 4096)]
    for other, device, words in [
        (form, hopper, "128 thread blocks for 1000 tokens leave some of 132 processors idle"),
        (form, Device("sm_100a", 132, SHARED["sm_100a"]), "this GPU is sm_100a"),
        (Form(Pattern.parse("32:2:8"), 4096, 4096), hopper, "32:2:8: 2 blocks of rows"),
        (Form(Pattern.parse("64:2:8@strip"), 4096, 4096), hopper, "no window"),
    ]:
        assert words in str(variants.no_window(other, 1000, device))
    odd = gemm(Form(Pattern.parse("128:2:5"), 200, 4096), torch.float16, 128 * 1001, hopper)
    assert isinstance(odd, Window)
    assert ((1, 2), (1002, 1), 5) == (odd.multicast, odd.grid(128 * 1001), odd.tile.stages)  # one panel of rows


@pytest.mark.parametrize("arch", SHARED)
def test_every_product_has_a_variant_that_fits_the_gpu(arch: str) -> None:
    device = Device(arch, 132, SHARED[arch])
    for one in chosen(arch):
        assert one.shared_bytes <= device.shared_bytes
        if isinstance(one, Decode):
            assert 1 <= splits(one, device) <= one.form.steps
        assert one.threads <= 1024
