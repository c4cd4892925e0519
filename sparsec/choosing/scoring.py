"""The share of a site's score that a pattern keeps, estimated on blocks and strips spread evenly over the weight."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparsec import columns
from sparsec.pattern import NM, VNM, Pattern, Unstructured

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 1 << 15  # weights that a share of a V:N:M or N:M pattern is read from: within 1 % on real weights
_LEAST_BLOCKS = 16
_GOLDEN = (math.sqrt(5) - 1) / 2
_STRIP, _STRIPS = 128, 2  # rows of a strip, and strips, for patterns that look at whole rows


def retained(pattern: Pattern, score: Tensor) -> float:
    """Share of a score (batch, rows, cols), finite and >= 0, that a pattern keeps."""
    import torch

    if isinstance(pattern, (NM, VNM)) and (blocks := _blocks(pattern, score)) is not None:
        found = blocks
        if isinstance(pattern, VNM):
            chosen = columns.choose(blocks, "greedy")
            found = blocks.gather(2, chosen[:, None].expand(-1, blocks.shape[1], -1))
        kept = found.topk(pattern.n, dim=2).values.sum(dtype=torch.float64)
        return float(kept / blocks.sum(dtype=torch.float64).clamp(min=1e-30))
    if not isinstance(pattern, Unstructured):
        score = some_rows(score, _STRIP * _STRIPS)
    mask = pattern.mask(pattern.project(score), score.shape[2])
    return float(score[mask].sum(dtype=torch.float64) / score.sum(dtype=torch.float64).clamp(min=1e-30))


def some_rows(weight: Tensor, most: int) -> Tensor:
    """(1, rows, cols): at most `most` rows of a weight (batch, rows, cols), in strips of 128 spread evenly.

    A smaller weight is given back as it is.
    """
    import torch

    batch, rows, _ = weight.shape
    if batch * rows <= most:
        return weight
    flat, strips, taken = weight.flatten(0, 1), batch * rows // _STRIP, most // _STRIP
    starts = [strips * i // taken * _STRIP for i in range(taken)]
    return torch.cat([flat[start : start + _STRIP] for start in starts])[None]


def _blocks(pattern: NM | VNM, score: Tensor) -> Tensor | None:
    """(blocks, V, M) whole blocks of a large score, spread evenly; None where all of it is to be looked at."""
    import torch

    height, width = (pattern.v if isinstance(pattern, VNM) else 1), pattern.m
    flat = score.flatten(0, 1)
    strips, groups = len(flat) // height, flat.shape[1] // width
    wanted = max(_SAMPLE // (height * width), _LEAST_BLOCKS)
    if strips * groups < 2 * wanted:
        return None
    blocks = flat[: strips * height, : groups * width].view(strips, height, groups, width)
    number = torch.arange(wanted)
    # Hammersley's points: even down and across, without the pattern that a regular grid of few points has.
    across = (number * _GOLDEN % 1 * groups).long().clamp(max=groups - 1)
    return blocks[number * strips // wanted, :, across]
