"""S-STE: weights are shrunk towards zero by a threshold that leaves what the pattern keeps, so nothing jumps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsec.columns import COLUMNS_PER_BLOCK
from sparsec.grouping import MOST_COMPARED, kept_of, pad_columns
from sparsec.pattern import NM, VNM, Pattern, Unstructured
from sparsec.training.parts import Act, Project, Tracked
from sparsec.training.schedules import Repeated


def soft_threshold(weight: Tensor, pattern: NM | VNM | Unstructured) -> Tensor:
    """sign(w) max(|w| - t, 0) of (batch, rows, cols), zero wherever the pattern keeps nothing.

    N:M: t is the largest |w| of a group that is not kept. Unstructured: of a matrix. V:N:M: first each block's columns
    are shrunk, c (1 - t / |c|), t the fifth largest of their lengths |c|; then rows as for 2:M. Continuous in w: what
    is about to be exchanged is zero before and after.
    """
    if isinstance(pattern, Unstructured):
        size = weight.abs().flatten(1)
        dropped = size.shape[1] - pattern.kept(*weight.shape[1:])
        least = size.kthvalue(dropped, dim=1).values if dropped else size.new_zeros(len(size))
        return _shrunk(weight, least[:, None, None])
    if isinstance(pattern, VNM):
        weight = _shrunk_columns(weight, pattern)
    batch, rows, cols = weight.shape
    groups = pad_columns(weight.flatten(0, 1), pattern.m, fill=0)
    if pattern.n == pattern.m:
        return weight
    return _shrunk(groups, _dropped(groups.abs(), pattern.n)).flatten(1)[:, :cols].reshape(batch, rows, cols)


def _dropped(size: Tensor, n: int) -> Tensor:
    """The largest of each group, (rows, groups, m), that is not among its n largest: (rows, groups, 1)."""
    if size.shape[2] > MOST_COMPARED:
        return size.topk(n + 1, dim=2).values[..., -1:]
    entries = size.permute(2, 0, 1).contiguous()
    return entries.masked_fill_(kept_of(entries, n), 0).amax(0)[..., None]


def _shrunk_columns(weight: Tensor, pattern: VNM) -> Tensor:
    batch, rows, cols = weight.shape
    missing = (pattern.groups(cols) * pattern.m - cols, pattern.strips(rows) * pattern.v - rows)
    padded = functional.pad(weight, (0, missing[0], 0, missing[1]))
    blocks = padded.view(batch, pattern.strips(rows), pattern.v, pattern.groups(cols), pattern.m)
    if pattern.m == COLUMNS_PER_BLOCK:
        return weight
    length = blocks.square().sum(2, keepdim=True).sqrt_()
    least = length.topk(COLUMNS_PER_BLOCK + 1, dim=4).values[..., -1:]
    factor = (1 - least / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp_(min=0)
    return (blocks * factor).view(padded.shape)[:, :rows, :cols]


def _shrunk(weight: Tensor, least: Tensor) -> Tensor:
    return weight.sign() * (weight.abs() - least).clamp_(min=0)


@dataclass(frozen=True)
class EveryStep(Repeated):
    """After every step, for the patterns that have a soft threshold."""

    every: int = 1

    def misfit(self, pattern: Pattern) -> str | None:
        if isinstance(pattern, (NM, VNM, Unstructured)):
            return None
        return (
            f"a soft threshold is defined for N:M, V:N:M and unstructured patterns, found {pattern}, whose groups are "
            "chosen and not given; use sr-ste or admm"
        )


@dataclass(frozen=True)
class SoftThreshold:
    """S-STE (Hu et al., arXiv 2409.09099): the model computes with beta S(w), and w gets its gradient.

    beta = <w, S(w)> / <S(w), S(w)> of each site, fixed before the first step. While gradients are taken the parameter
    holds beta S(w), and w when the optimizer steps: so decay and moments are those of w, and no node is needed.
    """

    act: ClassVar[Act] = "nothing"

    @torch.no_grad()
    def begin(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> None:
        for one in sites:
            dense = one.parameter.detach().clone()
            soft = _soft(one, dense)
            energy = float(soft.double().square().sum())
            beta = float((dense.double() * soft.double()).sum()) / energy if energy else 1.0
            one.tensors |= {"dense": dense, "beta": torch.tensor(beta), "mask": soft != 0}
            one.parameter.copy_(soft.mul_(beta))

    def choose(self, sites: Sequence[Tracked], project: Project, numbers: dict[str, Any]) -> dict[str, float]:
        changed = 0
        for one in sites:
            dense = one.tensors["dense"].copy_(one.parameter)
            soft = _soft(one, dense)
            mask = soft != 0
            changed += int((mask ^ one.tensors["mask"]).count_nonzero())
            one.tensors["mask"] = mask
            one.parameter.copy_(soft.mul_(float(one.tensors["beta"])))
        return {"changed": changed / max(sum(one.parameter.numel() for one in sites), 1)}

    @torch.no_grad()
    def pre_step(self, sites: Sequence[Tracked], numbers: dict[str, Any]) -> None:
        for one in sites:
            one.parameter.copy_(one.tensors["dense"])


def _soft(one: Tracked, weight: Tensor) -> Tensor:
    pattern, view = one.site.pattern, one.site.view
    assert isinstance(pattern, (NM, VNM, Unstructured))  # EveryStep.misfit refuses all others
    return view.to_parameter(soft_threshold(view.to_matrices(weight), pattern))
