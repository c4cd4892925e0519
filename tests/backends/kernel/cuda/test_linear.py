"""The operator around the kernels: strides, copies, workspace and arguments, with the emulation as the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from native import cuda_fibers
from native.gpu_kernels import assert_close, case, expected
from torch import Tensor

from sparsec.backends.kernel.cuda.linear import panel_linear, run
from sparsec.backends.kernel.cuda.panels import pack
from sparsec.backends.kernel.cuda.variants import Decode, Device, Gemm

BF16 = torch.bfloat16


class Emulated:
    """A GPU with so little of everything that small products use all it has."""

    device = Device("sm_80", 2, 40000)

    def __init__(self) -> None:
        self.ran: list[str] = []

    def launch(
        self, variant: Gemm | Decode, grid: tuple[int, int], tensors: Sequence[Tensor | None], numbers: Sequence[int]
    ) -> None:
        self.ran.append(variant.kernel)
        program = cuda_fibers.build(variant.kernel, variant.macros)
        raw = [None if one is None else memory(one) for one in tensors]
        raw[-1].copy_(cuda_fibers.launch(program, [*grid, variant.shared_bytes, 0, *numbers], raw[:-1], raw[-1]))

    def tickets(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32)


def memory(tensor: Tensor) -> Tensor:
    """From its first element to the end of its storage: what a pointer to it leads to."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((count,), (1,))


emulates = pytest.mark.skipif(cuda_fibers.missing() is not None, reason=str(cuda_fibers.missing()))


@emulates
@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("cols", [96, 101])
@pytest.mark.parametrize("by_token", [True, False])
def test_x_of_any_strides(make_layout, tokens: int, cols: int, by_token: bool) -> None:
    layout, x, bias = case(make_layout, "64:2:5", 70, cols, 2 * tokens)
    panels, gpu = pack(layout, BF16), Emulated()
    shapes = [
        x.view(2, tokens, cols)[1],
        x.view(tokens, 2, cols)[:, 1],
        x.view(2, tokens, cols),
        x.T.contiguous().T[1 : tokens + 1],
        torch.nn.functional.pad(x.T, (0, -2 * tokens % 8)).contiguous()[:, : 2 * tokens].T,
        x[:, None].expand(-1, 2, -1)[:tokens],
        x[:1],
        x[:0],
    ]
    for one in shapes:
        y = run(one, panels, bias, 70, "64:2:5", "gelu", by_token, gpu)

        assert (*one.shape[:-1], 70) == y.shape
        assert not y.numel() or y.is_contiguous() == by_token or y.shape[0] == 1
        if y.numel():
            assert_close(expected(layout, one, bias, "gelu"), y)
    assert ({"decode"} if tokens == 3 else {"gemm", "decode"}) == set(gpu.ran)


class Hopper(Emulated):
    """One processor, which a few thread blocks of window.cu fill, two stages in its shared memory."""

    device = Device("sm_90a", 1, 80000)


@emulates
@pytest.mark.slow
def test_many_tokens_on_hopper(make_layout) -> None:
    layout, x, bias = case(make_layout, "64:2:5", 270, 501, 140)
    panels, gpu = pack(layout, BF16), Hopper()
    for by_token in (True, False):
        for one in (x, x.T.contiguous().T[3:], x.view(2, 70, 501)):
            y = run(one, panels, bias, 270, "64:2:5", "gelu", by_token, gpu)

            assert_close(expected(layout, one, bias, "gelu"), y)
    assert {"window"} == set(gpu.ran)


@emulates
@pytest.mark.slow
def test_one_layer_reads_what_the_other_left_without_a_copy(make_layout, monkeypatch) -> None:
    first, x, _ = case(make_layout, "64:2:5", 72, 96, 43)
    second = make_layout("64:2:5", 64, 72, seed=1)
    middle = run(x, pack(first, BF16), None, 72, "64:2:5", "none", False, Emulated())
    monkeypatch.setattr(Tensor, "copy_", None)

    class Uncopied(Emulated):
        def launch(self, variant, grid, tensors, numbers) -> None:
            assert middle.data_ptr() == tensors[4].data_ptr()
            monkeypatch.undo()
            super().launch(variant, grid, tensors, numbers)

    found = run(middle, pack(second, BF16), None, 64, "64:2:5", "none", True, Uncopied())
    assert_close(expected(second, middle, None), found)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "64:2:8", "64:2:5@strip@moved"])
def test_the_reference_is_the_dense_product(make_layout, pattern: str, by_token: bool) -> None:
    layout, x, bias = case(make_layout, pattern, 70, 101, 6)
    y = panel_linear(x.view(2, 3, 101), pack(layout, BF16), bias, 70, str(layout.pattern), "silu", by_token)

    assert y.is_contiguous() == by_token
    assert_close(expected(layout, x, bias, "silu"), y.reshape(6, 70))


@pytest.mark.slow
@pytest.mark.parametrize("by_token", [True, False])
def test_the_operator_holds_what_it_declares(make_layout, by_token: bool) -> None:
    layout, x, bias = case(make_layout, "64:2:8", 70, 64, 6)
    arguments = (x.view(2, 3, 64), pack(layout, BF16), bias, 70, "64:2:8", "gelu", by_token)

    torch.library.opcheck(torch.ops.sparsec.panel_linear.default, arguments)


def test_wrong_arguments_are_named(make_layout) -> None:
    layout, x, bias = case(make_layout, "64:2:8", 70, 64, 6)
    panels = pack(layout, BF16)
    for arguments, words in [
        ((x.float(), panels, bias, 70, "64:2:8"), "bfloat16 and float16, found torch.float32"),
        ((x, panels, bias[:9], 70, "64:2:8"), r"expected a bias torch.bfloat16 \(70,\)"),
        ((x, panels[:-64], bias, 70, "64:2:8"), r"panels of a 64:2:8 weight 70 x 64"),
        ((x[:, :56], panels[1:], bias, 70, "64:2:8"), "load them again"),
        ((x, panels, bias, 70, "24:2:8"), "multiple of 16"),
        ((x, panels, bias, 70, "64:2:8", "tanh"), "found x .* tanh"),
    ]:
        with pytest.raises((TypeError, ValueError), match=words):
            panel_linear(*arguments)
    with pytest.raises(RuntimeError, match="no backward"):
        panel_linear(x.requires_grad_(), panels, bias, 70, "64:2:8")
