"""On a real GPU: products against float64, streams, CUDA graphs, torch.compile. Skipped where there is none."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from native.gpu_kernels import assert_close, case, expected

from sparsec.backends.kernel.cuda import driver
from sparsec.backends.kernel.cuda.driver import CudaGpu, cannot_run
from sparsec.backends.kernel.cuda.linear import panel_linear, run
from sparsec.backends.kernel.cuda.panels import form_of_layout, pack
from sparsec.backends.kernel.cuda.variants import every

pytestmark = pytest.mark.skipif(cannot_run() is not None, reason=str(cannot_run()))
BF16, FP16 = torch.bfloat16, torch.float16
HOPPER = cannot_run() is None and torch.cuda.get_device_capability() == (9, 0)


def on_gpu(make_layout, pattern: str, rows: int, cols: int, tokens: int, dtype: torch.dtype = BF16) -> tuple:
    """(layout, x, bias, panels), the last three on the GPU; what is allocated next finds NaN there."""
    layout, x, bias = case(make_layout, pattern, rows, cols, tokens, dtype)
    torch.full((1 << 26,), torch.nan, device="cuda")  # freed at once
    return layout, x.cuda(), bias.cuda(), pack(layout, dtype).cuda()


@pytest.mark.parametrize("tokens", [1, 7, 16, 32, 33, 100, 515])
@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "dtype"),
    [
        ("2:4", 130, 203, FP16), ("64:2:5", 1000, 1003, BF16), ("64:2:8", 1024, 1024, BF16),
        ("128:2:8", 1030, 2048, FP16), ("64:2:16", 512, 4000, BF16), ("32:2:6", 300, 711, BF16),
        ("16:2:9", 200, 800, BF16), ("64:2:20", 300, 2000, BF16), ("64:2:5@strip@moved", 900, 1500, BF16),
    ],
)  # fmt: skip
def test_products(make_layout, pattern: str, rows: int, cols: int, dtype: torch.dtype, tokens: int) -> None:
    layout, x, bias, panels = on_gpu(make_layout, pattern, rows, cols, tokens, dtype)
    reference = expected(layout, x.cpu(), bias.cpu(), "gelu")
    for by_token in (True, False):
        y = panel_linear(x, panels, bias, rows, str(layout.pattern), "gelu", by_token)

        assert_close(reference, y.cpu())


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("tokens", [33, 128, 515, 4096])
@pytest.mark.parametrize(
    ("pattern", "rows", "cols", "dtype"),
    [
        ("2:4", 130, 203, FP16), ("64:2:5", 1000, 1003, BF16), ("64:2:8", 1024, 4096, BF16),
        ("128:2:8", 1030, 2048, FP16), ("64:2:16", 512, 4000, BF16), ("192:2:7", 700, 3000, FP16),
    ],
)  # fmt: skip
def test_window_gives_the_bits_of_gemm(
    make_layout, pattern: str, rows: int, cols: int, dtype: torch.dtype, tokens: int
) -> None:
    layout, x, bias, panels = on_gpu(make_layout, pattern, rows, cols, tokens, dtype)
    window, gemm = CudaGpu(0), CudaGpu(0)
    window.device = dataclasses.replace(window.device, multiprocessors=1)  # few thread blocks fill it
    gemm.device = dataclasses.replace(gemm.device, multiprocessors=1 << 20)  # nothing does
    reference = expected(layout, x.cpu(), bias.cpu(), "gelu")
    for by_token in (True, False):
        found, same = (run(x, panels, bias, rows, pattern, "gelu", by_token, gpu) for gpu in (window, gemm))

        assert_close(reference, found.cpu())
        assert torch.equal(same, found)
    assert [{"window"}, {"gemm"}] == [{one.kernel for one in gpu._functions} for gpu in (window, gemm)]


def test_a_stream_of_ones_own_and_a_captured_graph(make_layout) -> None:
    for tokens in (5, 64):
        layout, x, bias, panels = on_gpu(make_layout, "64:2:8", 512, 4096, tokens)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = panel_linear(x, panels, bias, 512, "64:2:8")
        stream.synchronize()
        assert_close(expected(layout, x.cpu(), bias.cpu()), found.cpu())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = panel_linear(x, panels, bias, 512, "64:2:8")
        for seed in range(3):
            x.copy_(torch.randn(tokens, 4096, generator=torch.Generator().manual_seed(seed)))
            graph.replay()

            assert_close(expected(layout, x.cpu(), bias.cpu()), y.cpu())


def test_what_was_loaded_ahead_is_captured_at_its_first_launch_and_runs_in_a_new_thread(
    make_layout, monkeypatch
) -> None:
    on = CudaGpu(0)
    for tokens in (5, 64, 4096):
        layout, x, bias, panels = on_gpu(make_layout, "64:2:8", 512, 4096, tokens)
        on.load(every(form_of_layout(layout), BF16, on.device))
        x.T.contiguous()  # torch's own kernel that copies
        arguments, graph = (x, panels, bias, 512, "64:2:8", "none", True, on), torch.cuda.CUDAGraph()
        with monkeypatch.context() as patch:
            patch.setattr(driver, "cubin", None)
            with torch.cuda.graph(graph):
                y = run(*arguments)
            graph.replay()
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(run, *arguments).result()

        assert_close(expected(layout, x.cpu(), bias.cpu()), y.cpu())
        assert torch.equal(y, found)


def test_a_compiled_module_gives_the_same(make_layout) -> None:
    _, x, bias, panels = on_gpu(make_layout, "64:2:8", 512, 1024, 100)

    def two(x: torch.Tensor) -> torch.Tensor:
        middle = panel_linear(x, panels, bias, 512, "64:2:8", "gelu", False)
        return middle * 2

    assert torch.equal(two(x), torch.compile(two, fullgraph=True)(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_gpu_that_is_not_the_current_one(make_layout) -> None:
    layout, x, bias, panels = on_gpu(make_layout, "64:2:8", 512, 1024, 5)
    found = panel_linear(x.to("cuda:1"), panels.to("cuda:1"), bias.to("cuda:1"), 512, "64:2:8")

    assert_close(expected(layout, x.cpu(), bias.cpu()), found.cpu())
