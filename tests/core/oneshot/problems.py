"""Random layers to prune: weights, positive definite Gram matrices, and what is kept when magnitude chooses."""

from __future__ import annotations

import torch
from torch import Tensor


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(tokens: int, cols: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Correlated inputs (tokens, cols) whose sizes differ by exp(spread * normal)."""
    source = generator(seed)
    mixed = torch.randn(tokens, cols, generator=source) @ torch.randn(cols, cols, generator=source) / cols**0.5
    return mixed * torch.randn(cols, generator=source).mul(spread).exp()


def gram(cols: int, seed: int = 0, spread: float = 1.0, damping: float = 0.01) -> Tensor:
    """A damped Gram matrix (cols, cols), positive definite, float32."""
    x = inputs(3 * cols, cols, seed, spread).double()
    found = x.T @ x / len(x)
    return (found + damping * found.diagonal().mean() * torch.eye(cols)).float()


def weight(rows: int, cols: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, cols, generator=generator(seed + 1000))


def loss(dense: Tensor, kept: Tensor, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) in float64."""
    moved = (dense - kept).double()
    return float(((moved @ hessian.double()) * moved).sum())


def least_squares(dense: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    """The best values of the kept weights, row by row, in float64."""
    wide, found = hessian.double(), torch.zeros_like(dense, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            target = (dense[row].double() @ wide)[kept]
            found[row, kept] = torch.linalg.solve(wide[kept][:, kept], target)
    return found
