"""A loaded graph runs its sparse layers on panels; the CPU stands in for the GPU, on the operator's reference."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from emulated24 import compressed, kernels
from models import made, random
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsec import PassManager, _fx, registry, trace
from sparsec.backend import Verdict
from sparsec.backends.kernel import backend as kernel_backend
from sparsec.backends.kernel.backend import KernelBackend, Runnable
from sparsec.backends.kernel.cuda import destination as destinations
from sparsec.backends.kernel.cuda import install
from sparsec.backends.kernel.cuda.ceilings import H200
from sparsec.backends.kernel.cuda.destination import Destination
from sparsec.backends.kernel.cuda.linear import panel_linear, side_by_side
from sparsec.cost import TokenRange
from sparsec.errors import ArtifactError, UsageError
from sparsec.layout import SparseLayout
from sparsec.pipeline import relative_difference

BF16_OF_LAYERS = 2e-2  # a few layers, each rounded to 8 bits
CPU = torch.device("cpu")


class Gated(nn.Module):
    """The MLP of Llama, a residual, and a head, which stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(nn.functional.silu(self.gate(x)) * self.up(x)))


class Classic(nn.Module):
    """The MLP of BERT, whose middle someone else reads too if `leaks`, and a head."""

    def __init__(self, leaks: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.head, self.leaks = nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 4), leaks

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        middle = nn.functional.gelu(self.up(x))
        y = self.head(self.down(middle))
        return (y, middle) if self.leaks else (y,)


class Square(nn.Module):
    """Layers of a shape that torch's 2:4 products take, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(nn.functional.relu(self.up(x))))


class Attention(nn.Module):
    """Three layers that read the same, as those of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 48) for _ in range(3))
        self.head = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q(x) * self.k(x).sigmoid() + self.v(x))


def lowered(net: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16, passes: str = "16:2:8") -> GraphModule:
    chosen = PassManager.parse(f"mask{{pattern={passes}}} | freeze | lower")
    model, flat = made(net).to(dtype), net in (Square, Attention)
    example = random(*((2,) if flat else (2, 5)), 64 if net is Square else 32)
    dims = {"x": {0: "batch"} if flat else {0: "batch", 1: "length"}}
    return chosen.run(trace(model, {"x": example.to(dtype)}, dims)).module


def layers(module: GraphModule) -> list[tuple[str, bool]]:
    """The activation of every sparse layer, and whether its result lies by token."""
    calls = _fx.calls(module.graph, panel_linear)
    return [(str((*node.args[5:6], "none")[0]), bool((*node.args[6:7], True)[0])) for node in calls]


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (Gated, [("silu", False), ("none", False), ("none", True)]),
        (Classic, [("gelu", False), ("none", True)]),
        (lambda: Classic(leaks=True), [("gelu", True), ("none", True)]),
    ],
)
def test_layers_run_on_panels_with_their_activation(net: Callable[[], nn.Module], expected: list) -> None:
    module, x = lowered(net), random(2, 5, 32, seed=1).bfloat16()
    reference = module(x)
    verdicts = install.install_on(module, Destination(CPU))
    found = module.requires_grad_(False)(x)

    assert expected == layers(module)
    assert {("panels", True)} == {(one.kernel, one.sparse) for one in verdicts.values()}
    assert not [name for name, _ in module.named_buffers() if name.endswith("_values")]
    for name, value in reference.items():
        assert relative_difference(found[name].float(), value.float()) <= BF16_OF_LAYERS


def test_layers_without_a_kernel_run_dense_with_the_reason(caplog) -> None:
    with caplog.at_level(logging.WARNING, "sparsec"):
        for dtype, pattern in ((torch.float32, "16:2:8"), (torch.bfloat16, "8:2:8"), (torch.bfloat16, "1:4")):
            module, x = lowered(Classic, dtype, pattern), random(2, 5, 32).to(dtype)
            (expected,) = module(x).values()
            verdicts = install.install_on(module, Destination(CPU))
            (found,) = module(x).values()

            assert {("dense", False)} == {(one.kernel, one.sparse) for one in verdicts.values()}
            assert relative_difference(found.float(), expected.float()) <= BF16_OF_LAYERS
    assert ["--dtype bf16", "multiple of 16", "2:4 and V:2:M"] == [
        next(words for words in ("--dtype bf16", "multiple of 16", "2:4 and V:2:M") if words in record.getMessage())
        for record in caplog.records
    ]
    assert all(record.getMessage().startswith("2 sparse weights run dense on the GPU") for record in caplog.records)


SLOW = dataclasses.replace(H200, memory_bytes=1.0, sparse_flops=1.0, two_of_four_bytes=1.0, two_of_four_flops=1.0)
QUICK = dataclasses.replace(SLOW, launch_seconds=1e-12, two_of_four_bytes=1e20, two_of_four_flops=1e20)


def test_what_would_be_slower_runs_dense_and_its_verdict_says_why(caplog) -> None:
    slower = dataclasses.replace(SLOW, dense_flops=1e20, memory_bytes=1e20, launch_seconds=1e-12)
    module, x = lowered(Classic), random(2, 5, 32, seed=1).bfloat16()
    (expected,) = module(x).values()
    verdicts = install.install_on(module, Destination(CPU, slower, TokenRange(16, 16)))

    assert 2 == len(verdicts)
    for one in verdicts.values():
        assert (False, "dense") == (one.sparse, one.kernel)
        assert "x at 16 tokens on NVIDIA H200 (a model, not measured)" in one.reason
    assert [] == layers(module)
    assert torch.equal(expected, *module(x).values())
    assert "sparse weights run dense on the GPU: predicted" in caplog.text


def test_what_is_2_4_runs_on_torchs_product_where_that_is_fastest() -> None:
    """The net of 64 x 64 layers; torch's CUTLASS class stands in for its other one, and its product is emulated."""
    module, x = lowered(Square, passes="32:2:8"), random(16, 64, seed=1).bfloat16()
    (expected,) = module(x).values()
    verdicts = install.install_on(module, Destination(CPU, QUICK, compress=compressed))
    with kernels() as products:
        (found,) = module.requires_grad_(False)(x).values()

    assert {"cuSPARSELt"} == {one.kernel for one in verdicts.values()}
    assert 2 == len(products) and [] == layers(module)
    assert relative_difference(found.float(), expected.float()) <= BF16_OF_LAYERS
    without = install.install_on(lowered(Square, passes="32:2:8"), Destination(CPU, QUICK))
    assert {"dense"} == {one.kernel for one in without.values()}


def test_an_activation_that_panels_apply_counts_when_a_form_is_chosen() -> None:
    """At 16 tokens a product takes a second dense or as 2:4, an activation one more, and panels 1.5 seconds."""
    slow_panels = dataclasses.replace(
        H200, launch_seconds=1.0, sparse_flops=2 * 64 * 64 * 16 * H200.device.multiprocessors / 1.5
    )
    module = lowered(Square, passes="32:2:8")
    verdicts = install.install_on(module, Destination(CPU, slow_panels, TokenRange(16, 16), compressed))

    assert {"up.weight": "panels", "down.weight": "cuSPARSELt"} == {one.site: one.kernel for one in verdicts.values()}
    assert [("relu", True)] == layers(module)


def test_what_several_layers_read_is_laid_out_once() -> None:
    module, x = lowered(Attention), random(40, 32, seed=1).bfloat16()
    (expected,) = module(x).values()
    install.install_on(module, Destination(CPU))
    copies = list(_fx.calls(module.graph, side_by_side))
    (found,) = module.requires_grad_(False)(x).values()

    assert 1 == len(copies) and 3 == len(copies[0].users)
    assert relative_difference(found.float(), expected.float()) <= BF16_OF_LAYERS


@pytest.mark.parametrize("shape", [(40, 24), (2, 20, 24), (33, 24)])
def test_side_by_side_changes_where_numbers_lie_and_nothing_else(shape: tuple[int, ...]) -> None:
    x = random(*shape).bfloat16()
    laid = side_by_side(x)

    assert torch.equal(x, laid)
    assert 1 == laid.stride(-2) and 0 == laid.stride(-1) % 8
    assert laid.data_ptr() == side_by_side(laid).data_ptr()
    assert x.data_ptr() == side_by_side(x[:1]).data_ptr()


def test_what_runs_on_a_gpu_is_compiled_and_exported_as_one_graph() -> None:
    module, x = lowered(Gated), random(2, 5, 32, seed=1).bfloat16()
    install.install_on(module.requires_grad_(False), Destination(CPU))
    (expected,) = module(x).values()
    exported = torch.export.export(module, (x,))
    products = [node for node in exported.graph.nodes if node.target == torch.ops.sparsec.panel_linear.default]

    assert 3 == len(products)
    for compiled in (torch.compile(module, backend="eager", fullgraph=True), exported.module()):
        assert torch.equal(expected, *compiled(x).values())


def test_an_index_out_of_its_window_is_refused_before_anything_is_packed(monkeypatch) -> None:
    module = lowered(Classic)
    name = next(name for name, _ in module.named_buffers() if name.endswith("_columns"))
    _fx.get_tensor(module, name)[..., -1] = 8
    monkeypatch.setattr(install, "pack", None)
    with pytest.raises(ArtifactError, match=name.removesuffix("_columns") + ".*out of range"):
        install.install_on(module, Destination(CPU))


def test_a_full_gpu_is_told_with_the_layer(monkeypatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(install, "pack", full)
    with pytest.raises(UsageError, match=r"up.weight: no memory left on cpu for its panels"):
        install.install_on(lowered(Classic), Destination(CPU))
    with pytest.raises(UsageError, match=r"up.weight: no memory left on cpu for its 2:4 form"):
        install.install_on(lowered(Square, passes="32:2:8"), Destination(CPU, QUICK, compress=full))


def test_a_full_gpu_gets_back_what_was_taken(monkeypatch) -> None:
    """Though the error's traceback is still held."""
    packed, taken = install.pack, []

    def full_at_the_second(layout: SparseLayout, dtype: torch.dtype) -> Tensor:
        made = packed(layout, dtype)
        taken.append(weakref.ref(made))
        if len(taken) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return made

    def alive_when_memory_is_given_back() -> None:
        alive.append([one() is not None for one in taken])

    alive: list[list[bool]] = []
    monkeypatch.setattr(install, "pack", full_at_the_second)
    monkeypatch.setattr(torch.cuda, "empty_cache", alive_when_memory_is_given_back)
    with pytest.raises(UsageError, match="no memory left on cpu for its panels") as error:
        install.install_on(lowered(Classic), Destination(CPU))
    assert [[True, False], [False, False]] == alive and error.tb
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(_fx, "move", full)
    with pytest.raises(UsageError, match="the model: no memory left on cpu for its other weights; free some"):
        install.install_on(lowered(Classic), Destination(CPU))


def test_inputs_of_another_type_are_refused_on_a_gpu() -> None:
    module = lowered(Classic)
    install.install_on(module, Destination(CPU))
    loaded = Runnable(module, {}, CPU)

    loaded(random(2, 5, 32).bfloat16())
    with pytest.raises(UsageError, match=r"input x: expected bfloat16\[batch, length, 32\], found float16; convert it"):
        loaded(random(2, 5, 32).half())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_told_in_one_paragraph(tmp_path) -> None:
    backend = KernelBackend()
    for device, words in (("cuda", "no CUDA GPU was found"), ("mps", "no kernels for"), ("gpu0", "cannot be read")):
        with pytest.raises(UsageError, match=words) as error:
            backend.load_on(device, tmp_path, {})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("table", [None, H200])
def test_what_is_loaded_on_a_gpu_tells_what_runs_and_what_was_decided_by(table, tmp_path, monkeypatch, caplog) -> None:
    asked: list[tuple[object, ...]] = []
    verdict = Verdict("up.weight", False, "dense", "slower")
    for never in ("no_gpu", "unprepared"):
        monkeypatch.setattr(destinations, never, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setattr(kernel_backend, "_device", lambda text: torch.device(text))
    monkeypatch.setattr(kernel_backend, "read_graph", lambda folder: lowered(Classic))
    monkeypatch.setattr(kernel_backend, "install_on", lambda *given: asked.append(given) or {"up.weight": verdict})
    monkeypatch.setattr(destinations.ceilings, "of_gpu", lambda index: table)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    loaded = KernelBackend().load_on("cuda:1", tmp_path, {"recipe": {"tokens": "1-16"}})

    assert {"up.weight": verdict} == loaded.verdicts
    assert Destination(torch.device("cuda:1"), table, TokenRange(1, 16)) == asked[0][1]
    assert ("NVIDIA A100 was not measured" in caplog.text) == (table is None)


def test_other_backends_choose_their_device(tmp_path) -> None:
    with pytest.raises(UsageError, match="backend onnx chooses its device itself"):
        registry.backend("onnx").load_on("cuda", tmp_path, {})
