"""Seconds of a product on a GPU, from its ceilings: whichever of them binds first, for each kernel that could run it.

1. A product takes at least what its weights and activations take from memory, and no less than a launch.
2. gemm.cu and window.cu go step by step: tensor cores, L2 cache and shared memory work side by side, so the slowest
   sets the pace. Thread blocks run in rounds, one on each multiprocessor; in a round that is not full each gets more of
   the L2 cache, up to twice its share.
3. decode.cu reads each weight once; every thread block reads its activations from the L2 cache.
4. For many tokens x is read with its tokens side by side. A copy that does so is counted; inside an MLP there is none.
5. Where a kernel was measured, its roofline is divided by the share that it reached.
"""

from __future__ import annotations

import math

import torch

from sparsec.backends.kernel.cuda import variants
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.backends.kernel.cuda.panels import GROUPS, ROWS, Form
from sparsec.backends.kernel.cuda.variants import MOST_DECODED, Decode

DTYPE = torch.bfloat16  # fp16 takes as long
_FILL = 1e-6  # seconds until a kernel's pipeline is full, and from its last product to its last store
_STEP = 4096 + 512  # bytes of values and metadata of a panel and step
_COLUMNS = 4 * GROUPS  # gathered ones of a step


def dense(on: Ceilings, rows: int, cols: int, tokens: int) -> float:
    """torch's dense product of (tokens, cols) with a weight (rows, cols), in bf16."""
    moved = 2 * (rows * cols + tokens * (rows + cols))
    return _torch(on, "dense", 2 * rows * cols * tokens / on.dense_flops, moved / on.memory_bytes)


def two_of_four(on: Ceilings, rows: int, cols: int, tokens: int) -> float:
    """torch's 2:4 product (cuSPARSELt); its weights take 0.5625 of the dense bytes."""
    moved = 1.125 * rows * cols + 2 * tokens * (rows + cols)
    products = 2 * rows * cols * tokens / on.two_of_four_flops
    return _torch(on, "cuSPARSELt", products, moved / on.two_of_four_bytes)


def elementwise(on: Ceilings, rows: int, tokens: int) -> float:
    """A torch kernel that reads (tokens, rows) and writes as much, as activations do."""
    return max(on.launch_seconds, 4 * tokens * rows / on.memory_bytes)


def panels(on: Ceilings, form: Form, tokens: int, side_by_side: bool = False) -> float:
    """The GPU kernels' product; `side_by_side`: x lies as it is read (rule 4)."""
    if tokens <= MOST_DECODED and form.window:
        return _decode(on, variants.decode(form, DTYPE, tokens, on.device), tokens)
    turned = 0.0 if side_by_side else max(on.launch_seconds, 4 * tokens * form.cols / on.memory_bytes)
    return turned + _many(on, form, tokens)


def _torch(on: Ceilings, kernel: str, products: float, moved: float) -> float:
    return max(on.launch_seconds, max(products, moved) / on.reached.get(kernel, 1.0))


def _many(on: Ceilings, form: Form, tokens: int) -> float:
    """Rule 2, of the kernel that is chosen for this GPU and so many tokens."""
    variant = variants.gemm(form, DTYPE, tokens, on.device)
    tile, processors = variant.tile, on.device.multiprocessors
    of_window, of_panels = getattr(variant, "multicast", (1, 1))  # thread blocks that share one copy
    lines = GROUPS * form.window if form.window else _COLUMNS * tile.warps_m * form.blocks
    window = 2 * lines * tile.tokens
    panels = tile.warps_m * tile.panels * (_STEP + _COLUMNS * form.blocks * (1 if form.window else 4))
    gathered = 2 * _COLUMNS * tile.tokens * tile.warps_m * form.blocks
    # Seconds of a step of one thread block, at the rate of the whole GPU. window.cu copies panels to shared memory,
    # where every warp reads them; gemm.cu's warps each read them from the L2 cache.
    products = 2 * ROWS * tile.warps_m * tile.panels * tile.tokens * _COLUMNS / on.sparse_flops
    shared = window / on.gather(4) + gathered / on.gather(form.window or 4)
    if variant.kernel == "gemm":
        l2 = (window + tile.warps_n * panels) / on.l2_bytes
    else:
        l2 = (window / of_window + panels / of_panels) / on.l2_bytes
        shared += (1 + tile.warps_n) * panels / on.gather(4)
    full, left = divmod(math.prod(variant.grid(tokens)), processors)
    last = max(products, shared, l2 * max(left / processors, 0.5)) if left else 0.0
    steps = form.steps * processors * (full * max(products, shared, l2) + last)
    moved = form.nbytes + 2 * tokens * (form.rows + form.cols)
    return _own(on, variant.kernel, max(steps, moved / on.memory_bytes))


def _decode(on: Ceilings, variant: Decode, tokens: int) -> float:
    """Rule 3."""
    form, splits = variant.form, variants.splits(variant, on.device)
    blocks = math.prod(variant.grid(splits))
    windows = variant.grid(splits)[1] * form.steps * tokens * 2 * GROUPS * form.window
    sums = 8 * splits * variant.partial_floats if splits > 1 else 0  # written, and read again
    products = 2 * ROWS * form.panels * variant.tokens * _COLUMNS * form.steps
    moved = form.nbytes + 2 * tokens * (form.rows + form.cols)
    busy = min(1.0, blocks / on.device.multiprocessors)
    slowest = max(
        moved / on.memory_bytes, (form.nbytes + windows + sums) / on.l2_bytes, products / on.sparse_flops
    ) / busy  # fmt: skip
    return _own(on, variant.kernel, slowest)


def _own(on: Ceilings, kernel: str, seconds: float) -> float:
    return max(on.launch_seconds, _FILL + seconds / on.reached.get(kernel, 1.0))
