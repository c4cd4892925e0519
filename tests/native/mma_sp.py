"""mma.sp.m16n8k32 for 16-bit types with ordered metadata, from the fragment formulas of the PTX ISA, in float64.

Independent of the packer and of the C++ emulation: each names a lane's elements in its own way.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = torch.arange(32)
GROUP, THREAD = LANES >> 2, LANES & 3  # `groupID` and `threadID_in_group` of the ISA


def a_at(i: int) -> tuple[Tensor, Tensor]:
    """Row and compressed column of kept value `i` (of 8) in every lane."""
    row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
    chunk = THREAD * 4 + (16 if i >= 4 else 0)  # first column of the 4 logical ones that this pair belongs to
    return row, chunk // 2 + (i & 1)


def b_at(i: int) -> tuple[Tensor, Tensor]:
    """k and n of element `i` (of 8) in every lane."""
    return THREAD * 2 + (i & 1) + 8 * (i >> 1), GROUP


def c_at(i: int) -> tuple[Tensor, Tensor]:
    """Row and n of sum `i` (of 4) in every lane."""
    return GROUP + 8 * (i >> 1), THREAD * 2 + (i & 1)


def metadata_at(selector: int) -> list[tuple[int, int, int, int]]:
    """(lane, first bit, row, first column) of each 16 bits that the selector reads: 8 per lane pair of a group."""
    lanes = [lane for lane in range(32) if (lane & 3) >> 1 == selector]
    return [(lane, 16 * half, (lane >> 2) + 8 * half, 16 * (lane & 1)) for lane in lanes for half in (0, 1)]


def kept_columns(metadata: Tensor, selector: int) -> Tensor:
    """Which of the 32 columns each kept value stands for, (16, 16). ValueError where the metadata is not ordered."""
    columns = torch.full((16, 16), -1)
    for lane, bit, row, first in metadata_at(selector):
        for group in range(4):
            nibble = int(metadata[lane]) >> (bit + 4 * group) & 15
            low, high = nibble & 3, nibble >> 2
            if low >= high:
                raise ValueError(f"metadata {nibble:04b} of lane {lane} is undefined or not ordered")
            columns[row, first // 2 + 2 * group] = first + 4 * group + low
            columns[row, first // 2 + 2 * group + 1] = first + 4 * group + high
    return columns


def mma_sp(a: Tensor, b: Tensor, sums: Tensor, metadata: Tensor, selector: int) -> Tensor:
    """sums (32, 4) + A @ B, with fragments a (32, 8), b (32, 8) and metadata (32,) of the lanes of a warp."""
    kept, dense, result = torch.zeros(16, 16).double(), torch.zeros(32, 8).double(), sums.clone()
    for i in range(8):
        kept[a_at(i)], dense[b_at(i)] = a[:, i].double(), b[:, i].double()
    columns = kept_columns(metadata, selector)
    product = (kept[:, :, None] * dense[columns]).sum(1)
    for i in range(4):
        result[:, i] += product[c_at(i)]
    return result
