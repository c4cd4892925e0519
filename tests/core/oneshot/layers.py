"""One layer of every kind, and its output as (matrices, tokens, rows): what x W^T must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import made, random
from torch import Tensor, nn

import sparsec.ops  # noqa: F401  defines sparsec::expert_linear
from sparsec import Program, trace

Function = Callable[[Tensor, Tensor], Tensor]
Shape = tuple[int, ...]


class Weighted(nn.Module):
    """A function of an input and one parameter."""

    def __init__(self, shape: tuple[int, ...], function: Function) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of the input."""
    as_rows: Callable[[Tensor], Tensor]

    def program(self) -> Program:
        net = made(self.make)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
        return trace(net, (random(*self.shape),), dynamic={})


def _weighted(
    weight: tuple[int, ...], function: Function, x: tuple[int, ...], rows: Callable[[Tensor], Tensor]
) -> Case:
    return Case(lambda: Weighted(weight, function), x, rows)


def _last(y: Tensor) -> Tensor:
    return y.reshape(1, -1, y.shape[-1])


def _letters(equation: str, weight: tuple[int, ...], x: tuple[int, ...], order: str, rows: int) -> Case:
    """`order`: the output's letters as the tokens and rows of x W^T have them; the last `rows` letters are rows."""
    inputs, _, output = equation.partition("->")
    first = len(inputs.split(",")[0]) == len(x)

    def function(value: Tensor, parameter: Tensor) -> Tensor:
        return torch.einsum(equation, value, parameter) if first else torch.einsum(equation, parameter, value)

    def as_rows(y: Tensor) -> Tensor:
        y = y.permute([output.index(letter) for letter in order])
        return y.flatten(-rows).reshape(1, -1, y.shape[-rows:].numel())

    return _weighted(weight, function, x, as_rows)


def _convolution(make: Callable[[], nn.Module], x: tuple[int, ...], groups: int = 1) -> Case:
    def as_rows(y: Tensor) -> Tensor:
        return y.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)

    return Case(make, x, as_rows)


def _routed(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.sparsec.expert_linear(x, torch.tensor([2, 2, 5]), weight)


_EXPERTS = (3, 5, 4)
CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(5, 6), (2, 3, 5), _last),
    "addmm": _weighted((5, 6), lambda x, w: torch.addmm(torch.zeros(6), x, w), (4, 5), _last),
    "mm": _weighted((5, 6), lambda x, w: torch.mm(x, w), (4, 5), _last),
    "matmul": _weighted((5, 6), lambda x, w: x @ w, (2, 3, 5), _last),
    "matmul of a transposed weight": _weighted((6, 5), lambda x, w: x @ w.T, (2, 3, 5), _last),
    "weight on the left": _weighted((6, 5), lambda x, w: w @ x, (2, 5, 3), lambda y: _last(y.transpose(1, 2))),
    "mm with the weight on the left": _weighted((6, 5), lambda x, w: torch.mm(w, x), (5, 3), lambda y: _last(y.T)),
    "heads by einsum": _letters("ibh,hnd->ibnd", (5, 2, 3), (4, 2, 5), "ibnd", 2),
    "heads joined by einsum": _letters("ibnd,hnd->ibh", (5, 2, 3), (4, 2, 2, 3), "ibh", 1),
    "channels second by einsum": _letters("bhi,oh->boi", (6, 5), (2, 5, 3), "bio", 1),
    "summed letters in another order": _letters("bdni,hnd->bih", (5, 2, 3), (4, 3, 2, 2), "bih", 1),
    "weight first in einsum": _letters("oh,bhis->bosi", (6, 5), (2, 5, 3, 2), "biso", 1),
    "conv1d": _convolution(lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv1d in groups": _convolution(lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), (2, 4, 9), 2),
    "conv1d depthwise": _convolution(lambda: nn.Conv1d(4, 8, 3, padding=1, groups=4), (2, 4, 9), 4),
    "conv1d same": _convolution(lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=2), (2, 4, 9)),
    "conv1d valid": _convolution(lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid"), (2, 4, 9)),
    "conv2d": _convolution(lambda: nn.Conv2d(3, 4, (2, 3)), (2, 3, 6, 7)),
    "conv2d of patches": _convolution(lambda: nn.Conv2d(3, 4, 2, 2), (2, 3, 6, 6)),
    "conv2d in groups": _convolution(lambda: nn.Conv2d(4, 6, 3, (1, 2), (2, 1), (1, 2), 2), (2, 4, 7, 8), 2),
    "conv2d same": _convolution(lambda: nn.Conv2d(3, 4, (2, 3), padding="same", dilation=(2, 1)), (2, 3, 6, 7)),
    "conv2d valid": _convolution(lambda: nn.Conv2d(3, 4, 2, 2, padding="valid"), (2, 3, 6, 7)),
    "experts by bmm": _weighted(_EXPERTS, lambda x, w: torch.bmm(x, w), (3, 2, 5), lambda y: y),
    "experts by baddbmm": _weighted(
        _EXPERTS, lambda x, w: torch.baddbmm(torch.zeros(3, 1, 4), x, w), (3, 2, 5), lambda y: y
    ),
    "one input for all experts": _weighted(_EXPERTS, lambda x, w: x @ w, (1, 2, 5), lambda y: y),
    "a matrix for all experts": _weighted(_EXPERTS, lambda x, w: x @ w, (2, 5), lambda y: y),
    "experts behind a batch": _weighted(
        _EXPERTS, lambda x, w: x @ w, (2, 3, 2, 5), lambda y: y.transpose(0, 1).flatten(1, 2)
    ),
}
ROUTED = Case(lambda: Weighted(_EXPERTS, _routed), (5, 5), lambda y: y)
