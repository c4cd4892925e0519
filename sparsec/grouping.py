"""Rows cut in groups of M columns: padding the tail, the largest of each group, groups with too many nonzeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Violations:
    """Where a weight breaks a pattern: how many places, and the first few in words."""

    count: int
    first: tuple[str, ...]


def pad_columns(rows: Tensor, m: int, fill: float = -1) -> Tensor:
    """(rows, cols) cut in groups: (rows, groups, m), the tail filled up with `fill`."""
    import torch

    groups = math.ceil(rows.shape[1] / m)
    return torch.nn.functional.pad(rows, (0, groups * m - rows.shape[1]), value=fill).view(len(rows), groups, m)


def largest(groups: Tensor, n: int) -> Tensor:
    """Offsets of the `n` largest entries of each group, ascending: (rows, groups, n) uint8. Lowest index wins ties."""
    import torch

    m = groups.shape[2]
    if m > 16:
        order = groups.argsort(dim=2, descending=True, stable=True)
        return order[..., :n].sort(dim=2).values.to(torch.uint8)
    # Counting who beats whom is several times faster than sorting many short groups, and each offset lies in a run of
    # its own.
    entries = groups.permute(2, 0, 1).contiguous().unbind(0)
    beaten = torch.zeros(m, *groups.shape[:2], dtype=torch.uint8, device=groups.device)
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = entries[j] > entries[i]
            beaten[i] += later_wins
            beaten[j] += ~later_wins
    kept = (beaten < n).to(torch.uint8)
    offsets = torch.zeros(n, *groups.shape[:2], dtype=torch.uint8, device=groups.device)
    before = torch.zeros_like(beaten[0])  # how many of the offsets below j are kept
    for j in range(m):
        for place in range(max(0, n - m + j), min(n, j + 1)):
            offsets[place] += kept[j] * (before == place) * j
        before += kept[j]
    return offsets.permute(1, 2, 0).contiguous()


def offenders(counts: Tensor, limit: int, rows: str, rows_per_count: int) -> Violations:
    """Violations where `counts`, (batch, rows or strips) or (batch, rows or strips, groups), exceeds `limit`."""
    bad = (counts > limit).nonzero()
    first = tuple(
        f"{rows} {r * rows_per_count}{f' of matrix {b}' if counts.shape[0] > 1 else ''}"
        f"{''.join(f', group {g}' for g in group)}: "
        f"{int(counts[b, r, *group])} nonzero columns, at most {limit} allowed"
        for b, r, *group in bad[:3].tolist()
    )
    return Violations(len(bad), first)
