"""A parameter of any layout, seen as (batch, rows, cols): nothing is lost, and cols is the axis the layer sums over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparsec.pipeline import PassManager
from sparsec.program import Program
from sparsec.tracing import trace
from sparsec.view import WeightView

VIEWS = [
    WeightView((0, 1), (6, 4)),
    WeightView((1, 0), (4, 6)),
    WeightView((0, 1), (6, 4), 3),
    WeightView((0, 1, 2, 3), (6, 2, 3, 3), 2),
    WeightView((0, 2, 1), (3, 4, 6), experts=True),
    WeightView((1, 2, 0), (8, 2, 3), row_axes=2),
]


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_and_its_inverse_give_the_parameter_back(view: WeightView) -> None:
    parameter = torch.randn(view.parameter)

    matrices = view.to_matrices(parameter)

    assert view.shape == tuple(matrices.shape)
    assert torch.equal(parameter, view.to_parameter(matrices))
    assert view.to_parameter(matrices).is_contiguous()


@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 4)] * 3), st.booleans())
def test_every_order_of_axes_can_be_undone(axes: list[int], shape: tuple[int, int, int], experts: bool) -> None:
    view = WeightView(tuple(axes), shape, experts=experts)
    parameter = torch.arange(float(torch.tensor(shape).prod())).view(shape)

    assert torch.equal(parameter, view.to_parameter(view.to_matrices(parameter)))


class Conv1D(nn.Module):
    """GPT-2's layer: addmm with an [in, out] weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.out = (
            nn.Parameter(torch.randn(8, 6)),
            nn.Parameter(torch.zeros(6)),
            nn.Linear(6, 6),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight).relu()


class Grouped(nn.Module):
    """Two groups of channels, kernel 3 x 3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.stem(x)).relu()


class Depthwise(nn.Module):
    """One input channel for each output, and a one-dimensional convolution that mixes them."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.depth, self.last = nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=8), nn.Conv1d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.depth(self.mix(x.exp()))).relu()


class Experts(nn.Module):
    """Batched experts with [experts, in, out] weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x.transpose(0, 1), self.weight).relu()


class Stacked(nn.Module):
    """Query, key and value stacked in one parameter, read in parts, as nn.MultiheadAttention does."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Parameter(torch.randn(24, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, kv = self.in_proj.split([8, 16])
        key, value = nn.functional.linear(x, kv).chunk(2, -1)
        attended = nn.functional.scaled_dot_product_attention(nn.functional.linear(x, q), key, value)
        return attended.relu()


class Raw(nn.Module):
    """A weight on the left of a product, as Mamba's step projection."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight @ x.transpose(1, 2)).relu()


class Einsum(nn.Module):
    """Heads kept apart, as in XLNet: the input is summed, (heads, size) are the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ibh,hnd->ibnd", x, self.weight).relu()


CASES = [
    (Einsum, (2, 5, 8), "weight", "einsum", (1, 6, 8), "nm_weight"),
    (Conv1D, (4, 8), "weight", "conv1d_hf", (1, 6, 8), "nm_linear"),
    (Grouped, (2, 3, 5, 5), "conv.weight", "conv2d", (2, 3, 18), "nm_weight"),
    (Depthwise, (2, 4, 9), "mix.weight", "conv1d", (1, 8, 12), "nm_weight"),
    (Experts, (2, 3, 8), "weight", "experts", (3, 5, 8), "nm_weight"),
    (Stacked, (2, 5, 8), "in_proj", "linear", (3, 8, 8), "nm_weight"),
    (Raw, (2, 4, 8), "weight", "matmul", (1, 6, 8), "nm_weight"),
]


def traced(make: type[nn.Module], shape: tuple[int, ...]) -> Program:
    torch.manual_seed(0)
    return trace(make().eval(), [torch.randn(shape)])


@pytest.mark.parametrize(("make", "shape", "name", "kind", "seen", "operator"), CASES)
def test_a_layer_of_every_kind_is_masked_folded_stored_and_run(
    make: type[nn.Module], shape: tuple[int, ...], name: str, kind: str, seen: tuple[int, int, int], operator: str
) -> None:
    program = traced(make, shape)
    site = program.sites[name]
    assert (kind, seen) == (site.kind, site.shape)
    program = program.replace(sites=program.sites.with_targets({name: "2:4"}))

    lowered, _ = PassManager.parse("mask | freeze | lower").run_reported(program, check="outputs")

    frozen = PassManager.parse("mask | freeze").run(program)
    kept = frozen.sites[name].read(frozen.module)
    assert 0 == frozen.sites[name].pattern.violations(kept).count  # type: ignore[union-attr]
    assert {f"sparsec.{operator}.default"} == {
        str(node.target) for node in lowered.module.graph.nodes if str(node.target).startswith("sparsec.")
    }


def test_a_depthwise_convolution_is_excluded_with_its_reason() -> None:
    site = traced(Depthwise, (2, 4, 9)).sites["depth.weight"]

    assert "depthwise" == site.role
    assert "one input channel" in str(site.excluded)


def test_a_weight_multiplied_both_ways_is_no_site() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(torch.mm(x, self.weight), self.weight)

    program = traced(Both, (3, 4))

    assert 0 == len(program.sites)
    assert "two ways" in program.sites.exclusions[0].reason


def test_expert_linear_is_a_grouped_product_with_gradients() -> None:
    from sparsec.ops import expert_linear

    x = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([2, 2, 6])

    y = expert_linear(x, offsets, weight)

    torch.testing.assert_close(torch.cat([x[:2] @ weight[0], x[2:6] @ weight[2], torch.zeros(1, 5).double()]), y)
    assert torch.autograd.gradcheck(lambda x, weight: expert_linear(x, offsets, weight), (x, weight))
