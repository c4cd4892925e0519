"""The proof is worth something: bugs that are planted in the kernels' sources are all found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native import cuda_fibers
from native.gpu_kernels import assert_close, case, decode, expected, gemm
from torch import Tensor

from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import Decode, Tile

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_fibers.missing() is not None, reason=str(cuda_fibers.missing())),
]
TILE = Tile(tokens=32, warps_m=2, warps_n=2, stages=3)
GEMM = {
    "a step too few is waited for": ("wait<STAGES - 2>()", "wait<STAGES - 1>()"),
    "no barrier before a stage is read": ("        __syncthreads();  // all copies of this step", "        //"),
    "a stage is filled while others read it": ("copy_step(step + STAGES - 1);", "copy_step(step + STAGES);"),
    "the second half uses the first's metadata": ("multiply_half(Half<1>(), step,", "multiply_half(Half<0>(), step,"),
    "lines are not swizzled when they are copied": ("LINE + swizzled(line, piece) * 16;", "LINE + piece * 16;"),
    "one line too many is read": ("in_tokens && col < cols", "in_tokens && col <= cols"),
    "one piece of tokens too many is read": ("token + piece * 8 < tokens;", "token + piece * 8 < tokens + 8;"),
    "metadata stays at the first step": ("metadata_at[p] += more * 32;", "metadata_at[p] += 0;"),
    "weights beyond the last step are read": ("const int more = step + 1 < steps;", "const int more = 1;"),
    "rows 8 to 15 are stored over rows 0 to 7": ("m % 4 * 16 + high * 8 + group", "m % 4 * 16 + group"),
    "rows beyond the weight are stored": ("if (row >= row_count) continue;", ""),
    "the panels that fill a thread block are read": ("return p < panels ? p : panels - 1;", "return p;"),
    "all warps read the first one's indices": ("const int table = warp_m * BLOCKS + b", "const int table = b"),
    "results are turned where a stage is still read": ("__syncthreads();  // nobody reads the last stages", "//"),
    "the bias of the table's row": ("to_float(bias[row])", "to_float(bias[r])"),
    "indices are read one round early": ("= WINDOW ? 0 : STAGES - 1;", "= WINDOW ? 0 : STAGES - 2;"),
    "tokens are stored beyond the last": ("if (first_token + token >= tokens) break;", ""),
}  # fmt: skip
DECODE = {
    "a step too few is waited for": ("wait<STAGES - 2>()", "wait<STAGES - 1>()"),
    "copies are not waited for": ("        wait<STAGES - 2>();\n", ""),
    "a warp takes the other's stages": ("memory + warp * STAGES * STAGE;", "memory + warp * STAGE;"),
    "a piece over the end of a line is read whole": ("left >= 8 ? 16 : left > 0 ? 2 * left : 0", "left > 0 ? 16 : 0"),
    "the two columns of a pair change places": ("(two & 255);", "(two >> 8);"),
    "indices of the first half": ("16 * HALF + 4 * i + pair", "4 * i + pair"),
    "steps between splits are lost": ("steps * (split + 1) / splits", "steps * (split + 1) / splits - (splits > 1)"),
    "sums are added before they are there": ("    __syncthreads();\n    const auto store", "    const auto store"),
    "the last but one to finish adds": ("*ticket != splits - 1", "*ticket != splits - 2"),
    "the ticket stays": ("if (thread == 0) tickets[blockIdx.y] = 0;", ""),
    "rows that fill the last panel are stored": ("row < row_count && token < tokens", "token < tokens"),
    "tokens that fill the tile are stored": ("row < row_count && token < tokens", "row < row_count"),
    "an activation too many": ("sum += added[w * SUMS + at];", "sum += activated(added[w * SUMS + at]);"),
}  # fmt: skip


def source(kernel: str, bug: tuple[str, str]) -> str:
    text = (cuda_fibers.SOURCES / f"{kernel}.cu").read_text()
    assert text.count(bug[0]) == 1, "the bug has no place any more"
    return text.replace(*bug)


def found(run: Callable[[int], Tensor], reference: Tensor) -> str:
    """How it shows in a few runs: what the emulation says, or a wrong result; empty where it does not."""
    for seed in range(6):
        try:
            assert_close(reference, run(seed))
        except (RuntimeError, AssertionError) as error:
            return str(error) or "a wrong result"
    return ""


@pytest.mark.parametrize("name", GEMM)
def test_a_bug_in_gemm_is_found(make_layout, name: str) -> None:
    pattern = "64:2:5@strip@moved" if "indices are read" in name or "table's row" in name else "64:2:5"
    layout, x, bias = case(make_layout, pattern, 140, 357, 43)
    edited = source("gemm", GEMM[name])

    assert found(
        lambda seed: gemm(layout, x, bias, TILE, "gelu", seed=seed, edited=edited), expected(layout, x, bias, "gelu")
    )


@pytest.mark.parametrize("name", DECODE)
def test_a_bug_in_decode_is_found(make_layout, name: str) -> None:
    layout, x, bias = case(make_layout, "64:2:5", 140, 833, 5)
    variant = Decode(Form(layout.pattern, 140, 833), torch.bfloat16, 8, warps=2, activation="gelu")
    edited = source("decode", DECODE[name])

    assert found(
        lambda seed: decode(layout, x, bias, variant, 3, seed=seed, edited=edited), expected(layout, x, bias, "gelu")
    )
