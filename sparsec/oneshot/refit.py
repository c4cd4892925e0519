"""The best values of kept weights: least squares on the inputs' Gram matrix, by conjugate gradients for all rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 10
CLOSE = 1e-4  # of the first residual, in the preconditioned norm: below it, a row no longer changes visibly


def solve(target: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    """Minimise tr((W - Q) H (W - Q)^T) over the kept weights Q of each row, given W H; never worse than `start`.

    All (rows, cols) float32 but `hessian` (cols, cols). Preconditioned by the diagonal, as in ALPS.
    """
    import torch

    inverse = 1 / hessian.diagonal()
    kept = start * mask
    residual = (target - kept @ hessian) * mask
    scaled = residual * inverse
    direction, size = scaled.clone(), (residual * scaled).sum(1, keepdim=True)
    enough = size * CLOSE**2
    for _ in range(steps):
        if bool((size <= enough).all()):
            break
        ahead = (direction @ hessian) * mask
        length = torch.nan_to_num(size / (direction * ahead).sum(1, keepdim=True), 0.0, 0.0, 0.0)
        kept += length * direction
        residual -= length * ahead
        scaled = residual * inverse
        now = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.nan_to_num(now / size, 0.0, 0.0, 0.0) * direction
        size = now
    return kept
