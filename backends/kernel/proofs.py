"""What `verify` proves about one packed weight and the kernel of this machine."""

from __future__ import annotations

import torch

from sparsec.backend import FP32_TOLERANCE
from sparsec.backends.kernel.cpu import int8, linear, stream
from sparsec.layout import SparseLayout, decompress
from sparsec.ops import int8_linear
from sparsec.pipeline import relative_difference

KERNEL_TOKENS = (1, 3, 40)  # one size for each kernel, and one that leaves a tail in both


def kernel_problems(site: str, layout: SparseLayout) -> dict[str, str]:
    """`pack`: unpacking gives other bytes; `kernel`: the product is another. Empty when both hold."""
    problems = {}
    is_int8 = layout.stored == "int8"
    packed = int8.pack(layout) if is_int8 else stream.pack(layout)
    again = (int8.unpack(packed) if is_int8 else stream.unpack(packed)).tensors()
    if any(not torch.equal(again[table], tensor) for table, tensor in layout.tensors().items()):
        problems["pack"] = f"{site}: packing for the kernel and unpacking again changes the tables"
    generator = torch.Generator().manual_seed(0)
    for tokens in KERNEL_TOKENS:
        x = torch.randn(tokens, layout.shape[2], generator=generator)
        if is_int8:
            found, expected, allowed = (
                int8.int8_linear(x, packed, None, layout.shape[1]),
                int8_linear(x, layout, None),
                0.0,
            )
        else:
            found = linear.stream_linear(x, packed, None, layout.shape[1])
            expected, allowed = x @ decompress(layout, torch.float32)[0].T, FP32_TOLERANCE
        if (difference := relative_difference(found, expected)) > allowed:
            problems["kernel"] = f"{site}: {tokens} tokens differ by {difference:.1e}, allowed {allowed:.0e}"
    return problems
