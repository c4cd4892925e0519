"""What a dense program would take elsewhere, by what its calls compute and move."""

from __future__ import annotations

import torch
from models import Encoder, made, random
from torch import Tensor, nn

from sparsec import trace
from sparsec.imagined import imagine


class Kinds(nn.Module):
    """A call of each kind that counts, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table, self.conv = nn.Linear(8, 6), nn.Embedding(100, 8), nn.Conv1d(6, 4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.table(ids))
        scores = x @ x.transpose(1, 2)
        return self.conv(nn.functional.scaled_dot_product_attention(x, x, scores @ x).transpose(1, 2))


def counted(net: nn.Module, inputs: dict[str, Tensor]) -> dict[str, list[tuple[float, float]]]:
    """(operations, bytes) of all calls, in their order, by operator."""
    asked: list[tuple[float, float]] = []

    def seconds(operations: float, moved: float) -> float:
        asked.append((operations, moved))
        return float(len(asked))

    found = imagine(trace(net, inputs), (), inputs, 10, seconds)
    by_number = {one.seconds: one.operation for one in found.nodes.values() if one.seconds}
    kinds: dict[str, list[tuple[float, float]]] = {}
    for i, each in enumerate(asked):
        kinds.setdefault(by_number[i + 1.0], []).append(each)
    return kinds


def test_a_call_counts_its_products_and_its_tensors_at_16_bits() -> None:
    found = counted(made(Kinds), {"ids": torch.arange(10).view(2, 5)})

    assert [(0, 2 * 2 * 80)] == found["embedding"]  # what is found, read and written
    assert [(2 * 10 * 6 * 8, 2 * (80 + 48 + 6 + 60))] == found["linear"]
    assert [(2 * 2 * 5 * 5 * 6, 2 * (60 + 60 + 50)), (2 * 60 * 5, 2 * (50 + 60 + 60))] == found["matmul"]
    # x stands twice among what it reads, and counts once
    assert [(2 * 5 * (60 + 60), 2 * (60 + 60 + 60))] == found["scaled_dot_product_attention"]
    assert [(2 * 24 * 6 * 3, 2 * (60 + 72 + 4 + 24))] == found["conv1d"]
    assert "transpose" not in found


def test_the_whole_is_the_sum_and_the_rest_leaves_out_what_it_is_told() -> None:
    program = trace(made(Encoder), {"tokens": torch.arange(6).view(2, 3)}, {"tokens": {0: "batch", 1: "length"}})
    left_out = [node.name for node in program.module.graph.nodes if node.name.startswith("linear")]
    found = imagine(program, left_out, {"tokens": torch.arange(20).view(4, 5) % 6}, 20, lambda *_: 1.0)
    timed = [name for name, one in found.nodes.items() if one.seconds]

    assert (20, float(len(timed)), float(len(timed) - len(left_out))) == (found.tokens, found.seconds, found.rest)
    assert 20 == found.nodes[left_out[0]].rows


def test_nothing_is_computed() -> None:
    """The results would take 64 TB."""
    program = trace(made(lambda: nn.Linear(1, 16)), {"input": random(2, 1)}, {"input": {0: "batch"}})
    found = imagine(program, (), {"input": torch.zeros(1, 1).expand(1 << 40, 1)}, 1 << 40, lambda count, _: count)

    assert 2.0 * 16 * (1 << 40) == found.seconds
