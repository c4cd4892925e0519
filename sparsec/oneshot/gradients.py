"""Scores that need gradients, gathered on the dense model from a few batches before anything is pruned.

There are no labels. A language model's loss is that of the next token; any other model's is half the mean square of
its first output. `fisher` needs no loss: its gradients are those of the output along random directions, whose outer
products average to the Gauss-Newton matrix of the output's squared error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparsec.grouping import pad_columns
from sparsec.oneshot.scores import Score
from sparsec.pattern import NM, VNM
from sparsec.pipeline import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.sites import Site

MOST_BATCHES = 32
_FIRST, _SECOND = 0.8, 0.9  # SEVEN's decay of the gradient and of its square
_DAMPING = 0.01  # of a block's mean diagonal, added to it
_GROUP = 16  # columns of a Fisher block where the pattern has no groups
Batch = Mapping[str, "Tensor"]


def gather(
    program: Program, sites: Sequence[Site], batches: Sequence[Batch], score: Score, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Scores (batch, rows, cols) by site name. `score`: taylor, seven or fisher."""
    gatherers: dict[str, _Gatherer] = {}
    for site in sites:
        weight = site.read(program.module).float()
        gatherers[site.name] = {"taylor": _Taylor, "seven": _Seven, "fisher": _Fisher}[score](site, weight)
    taken = batches[:MOST_BATCHES]
    for done, gradients in enumerate(_gradients(program, sites, taken, score, seed)):
        progress(f"{score} gradients", done, len(taken))
        for site in sites:
            gatherers[site.name].add(site.view.to_matrices(gradients[site.name]).float())
    return {name: one.score() for name, one in gatherers.items()}


def _gradients(
    program: Program, sites: Sequence[Site], batches: Sequence[Batch], score: Score, seed: int
) -> Iterator[dict[str, Tensor]]:
    import torch

    from sparsec import _fx

    generator = torch.Generator().manual_seed(seed)
    weights = {site.name: _fx.get_tensor(program.module, site.name).detach().requires_grad_() for site in sites}
    loss = _probe(generator) if score == "fisher" else _next_token if _causal(program, batches[0]) else _mean_square
    for batch in batches:
        arguments = [batch[name] for name in program.inputs]
        outputs = torch.func.functional_call(program.module, weights, tuple(arguments))
        value = loss(_first(outputs).float(), batch)
        found = torch.autograd.grad(value, list(weights.values()), allow_unused=True)
        yield {
            name: torch.zeros_like(weights[name]) if grad is None else grad
            for name, grad in zip(weights, found, strict=True)
        }


def _first(outputs: dict[str, Tensor]) -> Tensor:
    return next(value for value in outputs.values() if value.is_floating_point())


def _causal(program: Program, batch: Batch) -> bool:
    """Whether the first output is next-token logits: as long as the input, and blind to what comes later."""
    import torch

    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] < 2:
        return False
    with torch.no_grad():
        before = _first(program(**batch))
        if before.dim() != 3 or before.shape[:2] != ids.shape:
            return False
        changed = torch.where(ids > 0, ids - 1, ids + 1)
        changed[:, 0] = ids[:, 0]  # all later ones change: some of them are no padding, wherever padding stands
        after = _first(program(**{**batch, "input_ids": changed}))
    same = torch.allclose(before[:, :1].float(), after[:, :1].float(), rtol=1e-4, atol=1e-5)
    return same and before.shape[2] > int(ids.max())


def _next_token(logits: Tensor, batch: Batch) -> Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def _mean_square(output: Tensor, batch: Batch) -> Tensor:
    return output.square().mean() / 2


def _probe(generator: Any) -> Callable[[Tensor, Batch], Tensor]:
    import torch

    def along(output: Tensor, batch: Batch) -> Tensor:
        direction = torch.randn(output.shape, generator=generator)
        return (output * direction).sum().div(len(output) ** 0.5)

    return along


class _Gatherer:
    def __init__(self, site: Site, weight: Tensor) -> None:
        import torch

        self.site, self.weight, self.steps = site, weight, 0
        self.total = torch.zeros_like(weight)

    def add(self, gradient: Tensor) -> None:
        raise NotImplementedError

    def score(self) -> Tensor:
        return self.total


class _Taylor(_Gatherer):
    def add(self, gradient: Tensor) -> None:
        self.total += (self.weight * gradient).abs()


class _Seven(_Gatherer):
    """I += |w g m / sqrt(v)|, m and v the bias-corrected running means of |g| and of its square."""

    def __init__(self, site: Site, weight: Tensor) -> None:
        import torch

        super().__init__(site, weight)
        self.first, self.second = torch.zeros_like(weight), torch.zeros_like(weight)

    def add(self, gradient: Tensor) -> None:
        self.steps += 1
        size = gradient.abs()
        self.first.mul_(_FIRST).add_(size, alpha=1 - _FIRST)
        self.second.mul_(_SECOND).addcmul_(size, size, value=1 - _SECOND)
        mean = self.first / (1 - _FIRST**self.steps)
        deviation = (self.second / (1 - _SECOND**self.steps)).sqrt() + 1e-9
        self.total += (self.weight * gradient * mean / deviation).abs()


class _Fisher(_Gatherer):
    """w^2 / [F^-1]_jj, F the mean of g g^T over the M weights of a group of a row."""

    def __init__(self, site: Site, weight: Tensor) -> None:
        import torch

        self.site, self.weight, self.steps = site, weight, 0
        pattern = site.pattern.executable if site.pattern else None
        self.m = pattern.m if isinstance(pattern, (NM, VNM)) else _GROUP
        groups = -(-weight.shape[2] // self.m)
        self.blocks = torch.zeros(weight.shape[0] * weight.shape[1], groups, self.m, self.m)

    def add(self, gradient: Tensor) -> None:
        self.steps += 1
        grouped = pad_columns(gradient.flatten(0, 1), self.m, fill=0)
        self.blocks += grouped[..., :, None] * grouped[..., None, :]

    def score(self) -> Tensor:
        import torch

        blocks = self.blocks / max(self.steps, 1)
        level = blocks.diagonal(dim1=2, dim2=3).mean() * _DAMPING + 1e-30
        inverse = torch.linalg.inv(blocks + level * torch.eye(self.m))
        spread = inverse.diagonal(dim1=2, dim2=3).flatten(1)[:, : self.weight.shape[2]]
        return self.weight.square().div(spread.view_as(self.weight).clamp(min=1e-30))
