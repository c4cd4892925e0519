"""A loaded graph runs its sparse layers on panels; the CPU stands in for the GPU, on the operator's reference."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from models import made, random
from torch import Tensor, nn
from torch.fx import GraphModule

from sparsec import PassManager, _fx, registry, trace
from sparsec.backends.kernel.backend import KernelBackend
from sparsec.backends.kernel.cuda import driver, install
from sparsec.backends.kernel.cuda.linear import panel_linear
from sparsec.errors import UsageError
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


def lowered(net: Callable[[], nn.Module], dtype: torch.dtype = torch.bfloat16, passes: str = "16:2:8") -> GraphModule:
    chosen = PassManager.parse(f"mask{{pattern={passes}}} | freeze | lower")
    return chosen.run(trace(made(net).to(dtype), (random(2, 5, 32).to(dtype),))).module


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
    installed = install.install_on(module, CPU).requires_grad_(False)
    found = installed(x)

    assert expected == layers(installed)
    assert not [name for name, _ in installed.named_buffers() if name.endswith("_values")]
    for name, value in reference.items():
        assert relative_difference(found[name].float(), value.float()) <= BF16_OF_LAYERS


def test_layers_without_a_kernel_run_dense_with_the_reason(caplog) -> None:
    with caplog.at_level(logging.WARNING, "sparsec"):
        for dtype, pattern in ((torch.float32, "16:2:8"), (torch.bfloat16, "8:2:8"), (torch.bfloat16, "1:4")):
            module, x = lowered(Classic, dtype, pattern), random(2, 5, 32).to(dtype)
            (expected,) = module(x).values()
            (found,) = install.install_on(module, CPU)(x).values()

            assert relative_difference(found.float(), expected.float()) <= BF16_OF_LAYERS
    assert ["--dtype bf16", "multiple of 16", "2:4 and V:2:M"] == [
        next(words for words in ("--dtype bf16", "multiple of 16", "2:4 and V:2:M") if words in record.getMessage())
        for record in caplog.records
    ]
    assert all(record.getMessage().startswith("2 sparse weights run dense on the GPU") for record in caplog.records)


def test_a_full_gpu_is_told_with_the_layer(monkeypatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(install, "pack", full)
    with pytest.raises(UsageError, match=r"up.weight: no memory left on cpu for its panels"):
        install.install_on(lowered(Classic), CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_told_in_one_paragraph(tmp_path) -> None:
    backend = KernelBackend()
    driver.no_gpu.cache_clear()
    for device, words in (("cuda", "no CUDA GPU was found"), ("mps", "no kernels for"), ("gpu0", "cannot be read")):
        with pytest.raises(UsageError, match=words) as error:
            backend.load_on(device, tmp_path, {})
        assert "\n" not in str(error.value)


def test_other_backends_choose_their_device(tmp_path) -> None:
    with pytest.raises(UsageError, match="backend onnx chooses its device itself"):
        registry.backend("onnx").load_on("cuda", tmp_path, {})
