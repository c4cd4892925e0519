"""A model may write into tensors in place: the graph computes the same without doing so, or refuses by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import made, random
from torch import Tensor, nn

from sparsec import trace
from sparsec.errors import TraceError

Write = Callable[[Tensor, Tensor], Tensor]


class Writes(nn.Module):
    def __init__(self, write: Write) -> None:
        super().__init__()
        self.fc, self.write = nn.Linear(4, 4), write

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.fc(x), x)


def one_column(y: Tensor, x: Tensor) -> Tensor:
    y[:, 1] = x[:, 2]
    return y * 2


def a_corner(y: Tensor, x: Tensor) -> Tensor:
    y[:, 1:3][:, 0] = 7.0
    return y


def two_columns_in_turn(y: Tensor, x: Tensor) -> Tensor:
    y[:, 0] = x[:, 0]
    y[:, 1] = y[:, 0] * 2
    return y


def a_chain(y: Tensor, x: Tensor) -> Tensor:
    z = y.add_(1.0).mul_(2.0)
    return z + y


def a_view_nobody_else_reads(y: Tensor, x: Tensor) -> Tensor:
    part = y[:, :2]
    part *= 3
    return part + 1


def into_empty_memory(y: Tensor, x: Tensor) -> Tensor:
    order = y.argsort(dim=-1)
    inverse = torch.empty_like(order)
    inverse.scatter_(1, order, torch.arange(4).expand_as(order))
    return y + inverse


def a_half_keeps_its_dtype(y: Tensor, x: Tensor) -> Tensor:
    small = y.to(torch.bfloat16)
    small.mul_(x)
    return small


@pytest.mark.parametrize(
    "write",
    [one_column, a_corner, two_columns_in_turn, a_chain, a_view_nobody_else_reads, into_empty_memory,
     a_half_keeps_its_dtype],
)  # fmt: skip
def test_what_is_read_after_a_write_is_what_was_written(write: Write) -> None:
    model = made(lambda: Writes(write))
    program = trace(model, (random(2, 4),))

    assert "_." not in program.dump().replace("._", "")
    for batch in (1, 5):
        x = random(batch, 4, seed=batch)
        with torch.no_grad():
            expected, found = model(x), program(x)["output"]
        assert expected.dtype == found.dtype
        assert torch.equal(expected, found)


def an_input(y: Tensor, x: Tensor) -> Tensor:
    x.add_(1.0)
    return y + x


def a_view_made_before(y: Tensor, x: Tensor) -> Tensor:
    part = y[:, :2]
    y.add_(1.0)
    return y[:, 2:] + part


def through_a_reshape(y: Tensor, x: Tensor) -> Tensor:
    y.view(-1).masked_fill_(y.view(-1) > 0, -1.0)
    return y


@pytest.mark.parametrize("write", [an_input, a_view_made_before, through_a_reshape])
def test_a_write_that_others_would_notice_is_refused(write: Write) -> None:
    with pytest.raises(TraceError, match=r"writes into a tensor in place \(aten\.\w+_\.\w+\)"):
        trace(made(lambda: Writes(write)), (random(2, 4),))
