"""Kernels are compiled and loaded before layers run: no number of tokens compiles anything afterwards."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Residual, made, random
from native.recording import Driver
from torch import Tensor, nn
from typer.testing import CliRunner

import sparsec
from sparsec import PassManager, _fx, trace
from sparsec.backends.kernel import parts
from sparsec.backends.kernel.cuda import ahead, build, driver, install
from sparsec.backends.kernel.cuda.ahead import Layer
from sparsec.backends.kernel.cuda.destination import Destination
from sparsec.backends.kernel.cuda.driver import CudaGpu, program_of
from sparsec.backends.kernel.cuda.linear import panel_linear, run
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import ACTIVATIONS, MOST_DECODED, Device, decode, every, gemm
from sparsec.cli import app
from sparsec.errors import UsageError
from sparsec.pattern import Pattern

CPU = torch.device("cpu")
BF16 = torch.bfloat16
TOKENS = (1, 7, 16, 33, 63, 64, 65, 512, 1024, 2048, 4097)
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_90a": 232448}
PATTERNS = ("2:4", "64:2:5", "64:2:8", "128:2:8", "64:2:16", "32:2:8", "16:2:6", "64:2:20", "64:2:8@strip")
needs_nvrtc = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


class Mlp(nn.Module):
    """A fused activation, a result that lies as the next layer reads it, and a head that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(32, 80), nn.Linear(80, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(nn.functional.gelu(self.up(x))))


def lowered(pattern: str, net: Callable[[], nn.Module] = Mlp) -> torch.fx.GraphModule:
    chosen = PassManager.parse(f"mask{{pattern={pattern}}} | freeze | lower")
    return chosen.run(trace(made(net).bfloat16(), {"x": random(2, 32).bfloat16()}, {"x": {0: "batch"}})).module


@pytest.fixture
def compiled(cuda: Driver, monkeypatch, tmp_path: Path) -> list[tuple[str, str]]:
    """What NVRTC was asked for: (kernel, GPU). The CPU stands in for GPU 0, which `cuda` records."""
    asked: list[tuple[str, str]] = []

    def compile_kernel(kernel: str, macros: dict[str, int], arch: str) -> build.Compiled:
        asked.append((kernel, arch))
        return build.Compiled(json.dumps([kernel, *macros.items()]).encode(), "", "")

    on = CudaGpu(0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compile_kernel", compile_kernel)
    monkeypatch.setattr(driver, "cubin", build.cubin)
    monkeypatch.setattr(ahead, "_gpu", lambda device: on)
    return asked


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PATTERNS), st.sampled_from(list(SHARED)), st.integers(1, 20000), st.integers(1, 300),
    st.integers(1, 10**6) | st.integers(1, 600), st.sampled_from(ACTIVATIONS), st.booleans(),
)  # fmt: skip
def test_what_any_number_of_tokens_runs_is_known_beforehand(
    pattern: str, arch: str, rows: int, processors: int, tokens: int, activation: Any, by_token: bool
) -> None:
    form, device = Form(Pattern.parse(pattern), rows, 4096, "strip" in pattern), Device(arch, processors, SHARED[arch])
    few = tokens <= MOST_DECODED
    if few and form.window:
        runs = decode(form, BF16, tokens, device, activation)
    else:
        runs = gemm(form, BF16, tokens, device, activation, by_token or few)
    unknown = ahead.variants_of([Layer(form, BF16, activation, by_token)], ahead.devices_named(arch))

    assert runs in every(form, BF16, device, activation, by_token)
    assert program_of(runs) in {program_of(one) for one in unknown}
    if few:  # as compiled code calls it
        assert form.window or gemm(form, BF16, tokens, device, activation, by_token) in every(
            form, BF16, device, activation, by_token
        )


def test_nothing_is_known_that_no_number_of_tokens_runs() -> None:
    """Of a form of 1536 rows: 3 numbers of tokens that decode, 3 tiles, and window by an even number of blocks."""
    device, form = Device("sm_90a", 132, SHARED["sm_90a"]), Form(Pattern.parse("64:2:8"), 1536, 384)
    runs = {gemm(form, BF16, tokens, device) for tokens in range(33, 20000)}
    runs |= {decode(form, BF16, tokens, device) for tokens in (1, 9, 17)}

    assert runs == every(form, BF16, device)
    assert [3, 3, 1] == [sum(one.kernel == kernel for one in runs) for kernel in ("decode", "gemm", "window")]
    assert "gemm" not in {one.kernel for one in every(Form(form.pattern, 50000, 384), BF16, device)}


@pytest.mark.parametrize("pattern", ["16:2:8", "64:2:8", "64:2:8@strip", "2:4"])
def test_a_loaded_graph_compiles_nothing_for_any_number_of_tokens(pattern: str, cuda: Driver, compiled: list) -> None:
    module = lowered(pattern)
    install.install_on(module, Destination(CPU))
    before, loaded = len(compiled), len(cuda.loaded)
    assert before == loaded == len(cuda.finished) > 5
    for node in _fx.calls(module.graph, panel_linear):
        _, panels, bias, rows, text, *rest = node.args
        activation, by_token = (*rest, *("none", True)[len(rest) :])
        tables = _fx.get_tensor(module, panels.target), _fx.get_tensor(module, bias.target)
        for tokens in TOKENS:
            x = random(tokens, 32 if rows == 80 else 80).bfloat16()
            for lies in (by_token or tokens <= MOST_DECODED, by_token):  # eager, and as compiled code calls it
                run(x, *tables, rows, text, activation, lies, ahead._gpu(CPU))

    assert 2 * 2 * len(TOKENS) == len(cuda.launches)
    assert (before, loaded) == (len(compiled), len(cuda.loaded))
    install.install_on(lowered(pattern), Destination(CPU))
    assert (before, loaded) == (len(compiled), len(cuda.loaded)), "the same kernels again"


def test_an_attached_model_compiles_nothing_for_any_number_of_tokens(cuda: Driver, compiled: list, tmp_path) -> None:
    options = sparsec.Options(measure_speed=False)
    artifact = sparsec.compile(
        made(Residual).bfloat16(), [random(3, 5).bfloat16()], pattern="16:2:8", out=tmp_path / "x.sparsec",
        options=options,
    )  # fmt: skip
    found = parts.read_parts(artifact.root, artifact.manifest, parts.on_gpu(Destination(CPU)))
    before = len(compiled)
    for make in found.layers.values():
        layer = make(None)
        for tokens in TOKENS:
            x = random(tokens, layer.in_features).bfloat16()
            run(x, layer.stream, None, layer.out_features, "16:2:8", "none", True, ahead._gpu(CPU))

    assert 2 == len(found.layers) and len(TOKENS) * 2 == len(cuda.launches)
    assert 5 < before == len(compiled) == len(cuda.loaded)
    with pytest.raises(TypeError, match=r"the layer's panels hold torch.bfloat16, and x is torch.float16: convert x"):
        layer(random(1, layer.in_features).half())


@pytest.mark.parametrize("device", ["h200", "sm_90", "sm_90a"])
def test_after_verify_with_a_device_loading_there_compiles_nothing(
    device: str, cuda: Driver, compiled: list, tmp_path: Path
) -> None:
    options = sparsec.Options(measure_speed=False)
    artifact = sparsec.compile(
        made(Mlp).bfloat16(), [random(3, 32).bfloat16()], pattern="64:2:8", out=tmp_path / "x.sparsec", options=options
    )
    assert not compiled
    result = CliRunner().invoke(app, ["verify", str(artifact.root), "--device", device, "--json"])
    check = json.loads(result.stdout)["checks"][-1]

    assert 0 == result.exit_code
    assert ("kernel: sm_90a", True) == (check["name"], check["ok"])
    assert f"{len(compiled)} kernels are compiled, and kept in {tmp_path / 'cache/sparsec/cubins'}" == check["detail"]
    before = len(compiled)
    module = sparsec.program.read_graph(artifact.root)
    install.install_on(module, Destination(CPU))
    parts.read_parts(artifact.root, artifact.manifest, parts.on_gpu(Destination(CPU)))
    assert before == len(compiled) and 5 < len(cuda.loaded) <= before


def test_what_cannot_be_compiled_for_a_device_is_told(compiled: list, tmp_path: Path) -> None:
    options = sparsec.Options(measure_speed=False)
    artifact = sparsec.compile(made(Residual), [random(3, 5)], pattern="16:2:8", out=tmp_path / "x", options=options)
    check = artifact.compile_for("h200")

    assert not check.ok and "no layer runs sparse there: it computes in float32; compile with --dtype" in check.detail
    assert not compiled
    with pytest.raises(UsageError, match=r"device 'h900' is not known; expected one of h200, sm_80, .*, or cuda"):
        artifact.compile_for("h900")
    (tmp_path / "w.safetensors").write_bytes(b"")
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "w.safetensors"), "--device", "h200"])
    assert 2 == result.exit_code and "no kernels can be compiled for h200" in result.stderr


def test_a_compiler_that_fails_stops_the_rest(compiled: list, monkeypatch) -> None:
    def fails(kernel: str, macros: dict[str, int], arch: str) -> build.Compiled:
        compiled.append((kernel, arch))
        raise UsageError(f"{kernel}.cu does not compile for {arch}")

    monkeypatch.setattr(build, "compile_kernel", fails)
    monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(UsageError, match="does not compile for sm_90a"):
        install.install_on(lowered("64:2:8"), Destination(CPU))
    assert 1 == len(compiled)


def test_a_long_wait_is_explained_once(compiled: list, monkeypatch, caplog) -> None:
    layers = [Layer(Form(Pattern.parse("64:2:8"), 64, 64), BF16)]
    ahead.load(layers, CPU)
    assert not caplog.records
    monkeypatch.setattr(ahead, "_PATIENCE", 0.0)
    ahead.load(layers, CPU)
    (said,) = (record.getMessage() for record in caplog.records)
    assert "compiling 7 GPU kernels for sm_90a, once; 1 are done" == said


def test_what_nobody_foresaw_is_compiled_at_its_launch_but_not_in_a_graph(
    cuda: Driver, compiled: list, monkeypatch, caplog, make_layout
) -> None:
    on, layout = ahead._gpu(CPU), make_layout("64:2:8", 70, 64)
    arguments = (random(3, 64).bfloat16(), install.pack(layout, BF16), None, 70, "64:2:8", "none", True, on)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UsageError, match="decode: a kernel that was not loaded yet cannot be captured in a CUDA graph"):
        run(*arguments)
    assert not compiled and not cuda.launches
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with caplog.at_level(logging.INFO, "sparsec"):
        run(*arguments)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run(*arguments)
    assert 1 == len(compiled) and 2 == len(cuda.launches)
    assert "decode for sm_90a is loaded at its first launch" in caplog.text


def test_each_gpu_has_kernels_of_its_own(cuda: Driver, compiled: list, monkeypatch) -> None:
    """torch makes a GPU's context the thread's when it goes to another GPU."""

    @contextmanager
    def going(index: int) -> Iterator[None]:
        cuda.cuCtxSetCurrent(100 + index)
        yield

    monkeypatch.setattr(torch.cuda, "device", going)
    first, second = CudaGpu(0), CudaGpu(1)
    for on in (first, second):
        monkeypatch.setattr(ahead, "_gpu", lambda device, on=on: on)
        ahead.load([Layer(Form(Pattern.parse("64:2:8"), 64, 64), BF16)], CPU)
    contexts, cubins = zip(*cuda.loaded, strict=True)

    half = len(cubins) // 2
    assert (half * (100,) + half * (101,), cubins[:half]) == (contexts, cubins[half:])
    assert half == len(compiled) == len(set(cubins)) > 3


RACE = """
import time
from sparsec.backends.kernel.cuda import build

build.compile_kernel = lambda *_: time.sleep(0.02) or build.Compiled(bytes(1 << 20), "", "")
for number in range(20):
    macros = {"WINDOW": number // 4}
    assert build.cubin("gemm", macros, "sm_90a") == bytes(1 << 20)
    build._write(build.cache_file("gemm", macros, "sm_90a"), bytes(1 << 20))
    assert build._read(build.cache_file("gemm", macros, "sm_90a")) == bytes(1 << 20)
"""


def test_processes_that_race_for_a_cubin_read_whole_ones(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    children = [subprocess.Popen([sys.executable, "-c", RACE], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [child.communicate()[1] for child in children]

    assert [0, 0, 0] == [child.returncode for child in children], said
    assert 5 == len(list((tmp_path / "sparsec" / "cubins").iterdir()))


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_all_kernels_of_an_mlp_compile(arch: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shapes = [((1536, 384), "gelu", False), ((384, 1536), "none", True)]
    layers = [
        Layer(Form(Pattern.parse("64:2:8"), *shape), BF16, activation, lies) for shape, activation, lies in shapes
    ]
    steps: list[tuple[int, int]] = []
    wanted = ahead.variants_of(layers, [Device(arch, 132, SHARED[arch])])
    count = ahead.compile_all(wanted, arch, lambda _, done, total: steps.append((done, total)))

    assert [(done + 1, count) for done in range(count)] == steps
    files = list((tmp_path / "sparsec" / "cubins").iterdir())
    assert 10 < count == len(files) <= len(wanted)
    for file in files:
        assert b"\x7fELF" == build._read(file)[:4]


def test_devices_have_names(monkeypatch) -> None:
    assert (Device("sm_90a", 132, SHARED["sm_90a"]),) == ahead.devices_named("H200")
    assert {"sm_80"} == {one.arch for one in ahead.devices_named("sm_80")}
    with pytest.raises(UsageError, match="sm_75"):
        ahead.devices_named("sm_75")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="cuda: no CUDA GPU was found; name the GPU that the kernels are for, such as"):
        ahead.devices_named("cuda")
    here = SimpleNamespace(major=8, minor=0, multi_processor_count=108, shared_memory_per_block_optin=SHARED["sm_80"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: here)
    assert (Device("sm_80", 108, SHARED["sm_80"]),) == ahead.devices_named("cuda:1")
