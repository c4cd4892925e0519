"""A sparse linear layer takes over the activation behind it, however that is written, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import Residual, made, random
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from sparsec import PassManager, _fx, trace
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.backends.kernel.fuse import fuse_activations
from sparsec.backends.kernel.install import install_kernels
from sparsec.pipeline import relative_difference

# The kernels' activations are good to 2e-6 absolute (test_activation.py), and y is of size 1 here.
TOLERANCE = 4e-6
ROWS = 11

pytestmark = pytest.mark.skipif(library.level() is None, reason=library.unavailable_reason() or "")


class Layer(nn.Module):
    """One sparse layer and what follows it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(8, ROWS), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.linear(x))


def lowered(net: nn.Module, *shape: int) -> GraphModule:
    passes = PassManager.parse("mask{pattern=2:4} | freeze | lower")
    return passes.run(trace(net, (random(*shape),))).module


def fused(after: Callable[[Tensor], Tensor]) -> list[str]:
    """The activations that the layers of a loaded graph apply; their outputs are those of the reference operator."""
    module, x = lowered(made(lambda: Layer(after)), 3, 8), 3 * random(3, 8, seed=1)
    (expected,) = module(x).values()
    found = install_kernels(module)
    assert relative_difference(next(iter(found(x).values())), expected) <= TOLERANCE
    return activations(found)


def activations(module: GraphModule) -> list[str]:
    return [str((*node.args[4:5], "none")[0]) for node in _fx.calls(module.graph, stream_linear)]


def in_transformers(name: str) -> Callable[[Tensor], Tensor]:
    from transformers.activations import ACT2FN
    from transformers.models.bloom.modeling_bloom import bloom_gelu_forward

    return bloom_gelu_forward if name == "bloom" else ACT2FN[name]  # type: ignore[no-any-return]


FUSED = {
    "relu": "relu", "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh", "bloom": "gelu_tanh",
}  # fmt: skip


@pytest.mark.parametrize(("name", "activation"), FUSED.items())
def test_each_activation_of_transformers_that_a_kernel_has_is_fused(name: str, activation: str) -> None:
    assert [activation] == fused(in_transformers(name))


@pytest.mark.parametrize(
    "name", ["quick_gelu", "gelu_accurate", "relu6", "relu2", "leaky_relu", "mish", "tanh", "sigmoid",
             "hardswish", "laplace"]
)  # fmt: skip
def test_every_other_one_stays(name: str) -> None:
    expected = "gelu_tanh" if name == "gelu_accurate" else "relu" if name == "relu2" else "none"
    assert [expected] == fused(in_transformers(name))


WRITTEN_OUT = {
    "sigmoid first": (lambda x: torch.sigmoid(x) * x, "silu"),
    "erf": (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
    "digits of float32": (lambda x: 0.5 * x * (1 + torch.erf(x * 0.70710678)), "gelu"),
    "one digit off": (lambda x: 0.5 * x * (1 + torch.erf(x * 0.70711)), "none"),
    "behind views": (lambda x: F.gelu(x.view(-1, 1, ROWS).reshape(-1, ROWS)), "gelu"),
    "another operator first": (lambda x: F.gelu(x + 1), "none"),
    "scaled after": (lambda x: 2 * F.silu(x), "silu"),
    "the layer's result is read too": (lambda x: F.gelu(x) + x, "none"),
    "an inner step is read too": (lambda x: x * torch.sigmoid(x) + torch.sigmoid(x).sum(), "none"),
    "only far from zero is it another": (lambda x: x * torch.sigmoid(x) + 1e-12 * x**3, "none"),
    "gated": (lambda x: x * torch.sigmoid(x.flip(-1)), "none"),
    "nothing follows": (lambda x: x, "none"),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_arithmetic_is_known_by_what_it_computes(name: str) -> None:
    after, activation = WRITTEN_OUT[name]
    assert [activation] == fused(after)


def test_only_the_layer_before_the_activation_is_changed_and_the_node_is_gone() -> None:
    module = install_kernels(lowered(made(Residual), 2, 5))

    assert ["gelu", "none"] == activations(module)
    assert [] == list(_fx.calls(module.graph, torch.ops.aten.gelu.default))
    _fx.check(module)


def test_a_second_run_changes_nothing() -> None:
    module = install_kernels(lowered(made(lambda: Layer(lambda x: F.silu(F.silu(x)))), 2, 8))
    before = str(module.graph)

    assert 0 == fuse_activations(module)
    assert before == str(module.graph)


def test_nan_and_infinity_go_through_a_fused_activation_as_through_torchs() -> None:
    net = made(lambda: Layer(F.gelu))
    with torch.no_grad():
        net.linear.weight.copy_(torch.eye(ROWS, 8))
        net.linear.bias.zero_()
    x = torch.eye(8)[:4] * torch.tensor([[torch.nan], [torch.inf], [-torch.inf], [1.0]])
    x = torch.where(torch.eye(8)[:4].bool(), x, 0.0)
    found = install_kernels(lowered(net, 3, 8))(x)

    # One by one: for more than one float32, torch calls oneDNN, whose gelu gives NaN for Inf on some processors.
    expected = torch.cat([F.gelu(value[None]) for value in x.diag()]).nan_to_num(nan=7.0)
    assert torch.equal(expected, next(iter(found.values())).nan_to_num(nan=7.0)[:, :4].diag())
