"""A loaded artifact is a torch module like others: compiled, exported, under autocast and inference mode."""

from __future__ import annotations

import shutil
from collections import Counter
from functools import cache

import pytest
import torch
from models import VOCABULARY, Encoder, made
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sparsec import PassManager, trace
from sparsec.backends.kernel.backend import Runnable
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.linear import records_operators, stream_linear
from sparsec.backends.kernel.install import install_kernels

SIZES = ((2, 5), (3, 7), (1, 1))
ROUNDED = 2e-6  # inductor fuses what is between the layers, in another order; values are of size 1

pytestmark = pytest.mark.skipif(library.level() is None, reason=library.unavailable_reason() or "")


@cache
def made_with(values: str) -> Runnable:
    """A small BERT with sparse layers, two sizes dynamic."""
    program = trace(made(Encoder), (tokens(2, 5),), {"tokens": {0: "batch", 1: "length"}}, {"length": 16})
    passes = f"mask{{pattern=2:2:4}} | freeze | lower{{values={values}}}"
    return Runnable(install_kernels(PassManager.parse(passes).run(program).module), {})


@pytest.fixture(params=["fp32", "int8"])
def loaded(request: pytest.FixtureRequest) -> Runnable:
    return made_with(request.param)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))


def sparse_calls(graph: torch.fx.Graph) -> Counter[str]:
    """How often each operator of sparsec is called."""
    return Counter(str(node.target) for node in graph.nodes if str(node.target).startswith("sparsec."))


@pytest.mark.parametrize("grad", [False, True])
def test_one_compiled_graph_serves_all_sizes(loaded: Runnable, grad: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loaded, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.set_grad_enabled(grad):
        for size in SIZES:
            found, expected = compiled(tokens(*size)), loaded(tokens(*size))
            assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow  # it calls a C++ compiler
@pytest.mark.skipif(not shutil.which("g++"), reason="TorchInductor needs g++")
def test_inductor_compiles_what_is_between_the_layers() -> None:
    torch.compiler.reset()
    loaded = made_with("fp32")
    compiled = torch.compile(loaded, fullgraph=True, dynamic=True)
    for size in SIZES:
        found, expected = compiled(tokens(*size)), loaded(tokens(*size))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=ROUNDED)


def test_a_compiled_graph_holds_each_layer_as_one_operator(loaded: Runnable) -> None:
    torch.compiler.reset()
    seen: list[Counter[str]] = []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> nn.Module:
        seen.append(sparse_calls(module.graph))
        return module

    torch.compile(loaded, fullgraph=True, backend=backend)(tokens(2, 5))

    assert [6] == [sum(calls.values()) for calls in seen]


def test_export_keeps_each_layer_as_one_node_and_gives_the_same_numbers(loaded: Runnable) -> None:
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=1, max=16)}
    exported = torch.export.export(loaded, (tokens(2, 5),), dynamic_shapes={"args": (sizes,)})

    assert [6] == list(sparse_calls(exported.graph).values())
    for size in SIZES:
        found, expected = exported.module()(tokens(*size)), loaded(tokens(*size))
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_who_records_operators_sees_them(loaded: Runnable) -> None:
    graph = make_fx(lambda x: loaded(x)["hidden"])(tokens(2, 5))
    other = tokens(2, 5).flip(1)

    assert [6] == list(sparse_calls(graph.graph).values())
    assert torch.equal(loaded(other)["hidden"], graph(other))
    assert not records_operators(other.float())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_records_the_product(loaded: Runnable) -> None:
    traced = torch.jit.trace(lambda x: loaded(x)["hidden"], (tokens(2, 5),), check_trace=False)
    other = tokens(2, 5).flip(1)

    assert torch.equal(loaded(other)["hidden"], traced(other))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_what_a_loop_gives(loaded: Runnable) -> None:
    layer = next(node for node in loaded.graph.graph.nodes if node.target is stream_linear or "linear" in node.name)
    stream, x = loaded.graph.get_buffer(str(layer.args[1].target)), torch.randn(3, 2, 4)
    product, rows = layer.target, layer.args[3]

    expected = torch.stack([product(one, stream, None, rows) for one in x])
    assert torch.equal(expected, torch.vmap(lambda one: product(one, stream, None, rows))(x))


def test_modes_without_gradients_give_the_same_numbers(loaded: Runnable) -> None:
    ids = tokens(2, 5)
    plain = loaded(ids)["hidden"]
    assert not plain.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", enabled=False)):
        with mode:
            assert torch.equal(plain, loaded(ids)["hidden"])


def test_autocast_is_refused_in_words(loaded: Runnable) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"float32.*found torch\.bfloat16"):
        loaded(tokens(2, 5))
