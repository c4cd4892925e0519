"""Rows cut in groups of M columns: padding the tail, the largest of each group, groups with too many nonzeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


MOST_COMPARED = 16  # entries of a group: more are sorted
_CHUNK = 1 << 17  # scores that are compared at once: they and what is made of them stay in cache


@dataclass(frozen=True)
class Violations:
    """Where a weight breaks a pattern: how many places, and the first few in words."""

    count: int
    first: tuple[str, ...]


def most_in(n: int, m: int, window: int) -> int:
    """Most columns that `window` columns from a multiple of `window` on can hold, with `n` in each group of `m`."""
    found = []
    for start in range(0, math.lcm(m, window), window):
        end = start + window
        shares = (min(group + m, end) - max(group, start) for group in range(start // m * m, end, m))
        found.append(sum(min(n, share) for share in shares))
    return max(found)


def pad_columns(rows: Tensor, m: int, fill: float = -1) -> Tensor:
    """(rows, cols) cut in groups: (rows, groups, m), the tail filled up with `fill`."""
    import torch

    groups = math.ceil(rows.shape[1] / m)
    return torch.nn.functional.pad(rows, (0, groups * m - rows.shape[1]), value=fill).view(len(rows), groups, m)


def largest(groups: Tensor, n: int) -> Tensor:
    """Offsets of the `n` largest entries of each group, ascending: (rows, groups, n) uint8. Lowest index wins ties."""
    import torch

    if (n, groups.shape[2]) == (2, 4):
        return two_of_four(groups)[1].flatten(2, 3)
    if groups.shape[2] > MOST_COMPARED:
        order = groups.argsort(dim=2, descending=True, stable=True)
        return order[..., :n].sort(dim=2).values.to(torch.uint8)
    return offsets_of(kept_of(groups.permute(2, 0, 1).contiguous(), n), n)


def kept_of(entries: Tensor, n: int) -> Tensor:
    """Scores of m <= MOST_COMPARED entries, (m, ...), each in a run of its own -> whether each is among the n largest.

    Counting who beats whom is several times faster than sorting many short groups. Lowest index wins ties.
    """
    import torch

    m = len(entries)
    if (n, m) == (2, 4) and (quick := _by_second(entries)) is not None:
        return quick
    beaten = torch.zeros(entries.shape, dtype=torch.uint8, device=entries.device)
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = entries[j] > entries[i]
            beaten[i] += later_wins.view(torch.uint8)
            beaten[j] += later_wins.logical_not_().view(torch.uint8)
    return beaten < n


def _by_second(entries: Tensor) -> Tensor | None:
    """2:4 by the second largest, from a network of minima and maxima: few operations. None where scores tie."""
    import torch

    a, b, c, d = entries.unbind(0)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    high_too, low_too = torch.maximum(c, d), torch.minimum(c, d)
    second = torch.maximum(torch.minimum(high, high_too), torch.maximum(low, low_too))
    # As 0.0 and 1.0 first: a comparison that gives bool takes three times as long.
    kept = torch.ge(entries, second, out=torch.empty_like(entries)).bool()
    return kept if int(kept.count_nonzero()) == 2 * a.numel() else None


def two_of_four(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The 2 largest of every 4 float32 in a row: where they are, as bool, and their offsets, (..., 4 g) -> (..., g, 2).

    Lowest index wins ties; without NaN. Every score is compared with those 1, 2 and 3 places on. What four neighbours
    give are the four bytes of an integer, the first one the lowest: one operation counts for a whole group.
    """
    import torch

    order, ones, low, high, equal, one, eight, *inside = (
        torch.tensor(value, dtype=torch.int32, device=scores.device)  # a plain number would be converted every time
        for value in (0x03020100, 0x01010101, 0xFF, 0xFF00, 258, 1, 8, 0x010101, 0x0101, 0x01)
    )
    flat = scores.flatten()
    mask = torch.empty_like(flat, dtype=torch.bool)
    offsets = torch.empty(len(flat) // 4, dtype=torch.int16, device=flat.device)
    larger = torch.zeros_like(flat[:_CHUNK])  # as 0.0 and 1.0: a comparison that gives bool takes three times as long
    for part, kept, places in zip(flat.split(_CHUNK), mask.split(_CHUNK), offsets.split(_CHUNK // 4), strict=True):
        found = larger[: len(part)]
        beaten = kept.view(torch.int32).copy_(order)  # how many of the others are before a score, if none were larger
        for distance, first_ones in enumerate(inside, 1):
            torch.gt(part[distance:], part[:-distance], out=found[:-distance])
            later = found.to(torch.int8).view(torch.int32).bitwise_and_(first_ones)  # not those of the next group
            beaten.sub_(later, alpha=256**distance - 1)  # the later one is beaten once less, the earlier once more
        flags = beaten.bitwise_right_shift_(one).bitwise_and_(ones).bitwise_xor_(ones)  # beaten by 0 or 1
        moved = flags >> eight
        either = flags | moved
        # The first is 2 - a - (a or b), the last 1 + d + (c or d).
        first = (either + flags).bitwise_and_(low)
        last = either.add_(moved).bitwise_right_shift_(eight).bitwise_and_(high)
        places.copy_(last.sub_(first).add_(equal))
    groups = scores.shape[-1] // 4
    return mask.view(scores.shape), offsets.view(torch.uint8).view(*scores.shape[:-1], groups, 2)


def offsets_of(kept: Tensor, n: int) -> Tensor:
    """(m, rows, groups) bool with n true in each group -> their offsets, ascending: (rows, groups, n) uint8."""
    import torch

    m, flags = len(kept), kept.view(torch.uint8)
    if n <= 2:  # the first and the last of each group, without counting what lies between
        return torch.stack([_first(flags), _last(flags)][:n], 2)
    offsets = torch.zeros(n, *kept.shape[1:], dtype=torch.uint8, device=kept.device)
    before = torch.zeros_like(flags[0])  # how many of the offsets below j are kept
    for j in range(m):
        for place in range(max(0, n - m + j), min(n, j + 1)):
            if j:
                offsets[place] += flags[j] * (before == place).view(torch.uint8) * j
        before += flags[j]
    return torch.stack(offsets.unbind(0), 2)


def _first(flags: Tensor) -> Tensor:
    """(m, ...) of 0 and 1 -> where the first 1 is, by counting the 0s before it."""
    missing = 1 - flags[:-1]
    count = missing.new_zeros(flags.shape[1:])
    for absent in reversed(missing.unbind(0)):
        count = count.add_(1).mul_(absent)
    return count


def _last(flags: Tensor) -> Tensor:
    """(m, ...) of 0 and 1 -> where the last 1 is."""
    import torch

    place = torch.zeros_like(flags[0])
    for j in range(1, len(flags)):
        torch.maximum(place, flags[j] * j, out=place)
    return place


def offenders(counts: Tensor, limit: int, rows: str, rows_per_count: int) -> Violations:
    """Violations where `counts`, (batch, rows or strips) or (batch, rows or strips, groups), exceeds `limit`."""
    over = counts > limit
    bad = over.nonzero() if bool(over.any()) else over.new_empty(0, counts.dim())  # any() is several times faster
    first = tuple(
        f"{rows} {r * rows_per_count}{f' of matrix {b}' if counts.shape[0] > 1 else ''}"
        f"{''.join(f', group {g}' for g in group)}: "
        f"{int(counts[b, r, *group])} nonzero columns, at most {limit} allowed"
        for b, r, *group in bad[:3].tolist()
    )
    return Violations(len(bad), first)
