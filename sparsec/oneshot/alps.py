"""ALPS: the mask and the values of a layer together, by ADMM on its reconstruction error (arXiv 2406.07831).

minimise ||X (W0 - W)^T||^2 subject to W = D, D in the pattern:
    B = (H + rho I)^-1 (H W0 - V + rho D);  D = project(B + V / rho);  V += rho (B - D)
with H's eigenvectors taken once, and its columns scaled to a unit diagonal. rho grows while the support still changes;
here a little at every step (the paper: more at every third), which needs fewer steps for the same error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sparsec.oneshot.refit import solve

if TYPE_CHECKING:
    from torch import Tensor

RHO = 0.1
_MOST_STEPS = 300
_MOST_RHO = 1e3  # against a unit diagonal: nothing moves any more
_SETTLED = 0.002  # share of the kept weights that still move when the mask is taken as it is
_GROWTH = ((0.1, 1.1), (0.005, 1.07), (0.0, 1.05))  # more than this share moved -> rho grows by this factor
Project = Callable[["Tensor"], "Tensor"]
"""Scores (cols, rows), not negative -> mask."""


def alps(weight: Tensor, hessian: Tensor, target: Tensor, project: Project) -> Tensor:
    """The pruned weight (rows, cols), 0 where nothing is kept.

    `weight`: where to start, float32; `hessian`: damped; `target`: W H of the best weight W, (rows, cols).
    """
    import torch

    scale = hessian.diagonal().sqrt()
    unit = hessian / scale[:, None] / scale
    values, vectors = torch.linalg.eigh(unit)
    values = values.clamp(min=0)[:, None]
    wanted = vectors.T @ (target / scale).T  # from here on all is (cols, rows)
    sparse = (weight * scale).T.contiguous()
    dual, rho = torch.zeros_like(sparse), RHO
    mask, settling = torch.ones_like(sparse, dtype=torch.bool), True
    for step in range(_MOST_STEPS):
        free = vectors @ ((wanted + vectors.T @ (rho * sparse - dual)) / (values + rho))
        ahead = free + dual / rho
        now = project(ahead.square())
        sparse = ahead * now
        dual += rho * (free - sparse)
        moved = int((now ^ mask).count_nonzero()) / max(int(now.count_nonzero()), 1)
        mask = now
        settling = settling and (step == 0 or moved <= _SETTLED)  # rho is still too small to bend the first mask
        if (not settling and moved <= _SETTLED) or rho > _MOST_RHO:
            break
        rho *= _GROWTH[0][1] if settling else next(factor for share, factor in _GROWTH if moved >= share)
    mask = mask.T.contiguous()
    return solve(target / scale, unit, mask, sparse.T.contiguous()) / scale
