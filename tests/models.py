"""Nets of fewer than 200 parameters, one for each thing a graph can hold. Weights are the same on every call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Net = TypeVar("Net", bound=nn.Module)
TOKENS, WIDTH, VOCABULARY = 3, 4, 10


def made(make: Callable[[], Net], seed: int = 0) -> Net:
    """A net in eval mode with its random weights fixed, the global generator left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Residual(nn.Module):
    """x + down(gelu(up(x))): two sites, neither of them a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Classifier(nn.Module):
    """One site and a head, which is excluded."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


class Tied(nn.Module):
    """One weight under two names, used by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Dropouts(nn.Module):
    """Dropout as a module, dropout in attention, and batch norm: all that a mode switches."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(4)
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.linspace(-1, 1, 4))
            self.norm.running_var.copy_(torch.linspace(0.5, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        split = [layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(*split, dropout_p=0.5 if self.training else 0.0)
        mixed = self.drop(mixed.transpose(1, 2).flatten(2))
        return self.norm(mixed.transpose(1, 2)).transpose(1, 2)


class Encoder(nn.Module):
    """A BERT in small: embedding, attention, feed-forward, pooler and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.words(tokens)
        split = [layer(hidden).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        hidden = self.norm(hidden + self.out(mixed))
        hidden = hidden + self.down(functional.gelu(self.up(hidden)))
        return {"hidden": hidden, "pooled": torch.tanh(self.pooler(hidden[:, 0]))}


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)), as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.silu(self.gate(x)) * self.up(x))


class Transposed(nn.Module):
    """GPT-2's Conv1D: the weight lies as (inputs, outputs) and feeds addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)
