"""What a loaded artifact does with inputs, folders and settings that cannot be run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Residual, made, random
from torch import Tensor

import sparsec
from sparsec import PassManager, _fx, trace
from sparsec.backends.kernel.cpu import int8, library
from sparsec.backends.kernel.cpu.linear import run, stream_linear
from sparsec.backends.kernel.cpu.stream import pack
from sparsec.backends.kernel.install import install_kernels
from sparsec.errors import ArtifactError, UsageError
from sparsec.layout import compress, stored_as
from sparsec.pattern import Pattern

ROWS, COLS = 12, 20

pytestmark = pytest.mark.skipif(library.level() is None, reason=library.unavailable_reason() or "")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "residual.sparsec"
    dynamic = {"x": {0: "tokens"}}
    return sparsec.compile(made(Residual), (random(2, 5),), pattern="2:4", out=out, dynamic=dynamic).root


@pytest.fixture(scope="module")
def stream() -> Tensor:
    weight, pattern = random(1, ROWS, COLS), Pattern.parse("2:4")
    return pack(compress(weight, pattern, pattern.project(weight.abs(), "l1")))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_number_types_are_refused_by_name(artifact: Path, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"run float32 on the CPU; found {dtype}"):
        sparsec.load(artifact)(random(2, 5).to(dtype))


@pytest.mark.parametrize("shape", [(2, 6), (5,), (1, 2, 5)])
def test_other_sizes_than_were_traced_are_refused_by_name(artifact: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"input x: expected float32\[tokens, 5\], found .* name those that vary"):
        sparsec.load(artifact)(random(*shape))


def test_any_strides_give_the_numbers_of_a_contiguous_copy(artifact: Path) -> None:
    loaded, base = sparsec.load(artifact), random(5, 6)
    for x in (
        base.T,
        base[:, :5][::2],
        random(1, 5).expand(4, 5),
        random(4, 1).expand(4, 5),
        random(8)[3].expand(2, 5),
    ):
        assert torch.equal(one(loaded(x.contiguous())), one(loaded(x)))


def test_no_tokens_give_no_outputs(artifact: Path, stream: Tensor) -> None:
    for activation in ("none", "gelu"):
        assert (0, ROWS) == stream_linear(torch.empty(0, COLS), stream, None, ROWS, activation).shape
        assert (3, 0, ROWS) == stream_linear(torch.empty(3, 0, COLS), stream, None, ROWS, activation).shape
    assert (0, 5) == one(sparsec.load(artifact)(torch.empty(0, 5))).shape


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(stream: Tensor, threads: int) -> None:
    with pytest.raises(ValueError, match=f"at least 1 thread .*found {threads}"):
        run(random(2, COLS), stream, None, ROWS, threads, library.supported()[0])


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused_for_int8(threads: int) -> None:
    weight, pattern = random(1, ROWS, COLS), Pattern.parse("4:2:5")
    packed = int8.pack(stored_as(compress(weight, pattern, pattern.project(weight.abs(), "l1")), "int8"))
    with pytest.raises(ValueError, match=f"at least 1 thread .*found {threads}"):
        int8.run(random(2, COLS), packed, None, ROWS, threads, library.supported()[0])


def test_a_stream_that_was_moved_is_refused(stream: Tensor) -> None:
    with pytest.raises(TypeError, match=r"stream of bytes on the CPU, found torch\.uint8 on meta"):
        stream_linear(random(2, COLS), stream.to("meta"), None, ROWS)


def test_a_number_is_no_row_of_activations(stream: Tensor) -> None:
    with pytest.raises(ValueError, match=r"x \(\.\.\., in_features\)"):
        stream_linear(torch.tensor(1.0), stream, None, ROWS)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_nan_reaches_only_rows_that_keep_its_column_through_every_activation(activation: str) -> None:
    pattern, weight = Pattern.parse("1:4"), torch.ones(1, 3, 4)
    layout = compress(weight, pattern, pattern.project(torch.eye(4)[None, [0, 1, 1]], "l1"))
    x = torch.tensor([[torch.nan, 1.0, torch.nan, torch.inf]])
    y = stream_linear(x, pack(layout), None, 3, activation)

    assert [True, False, False] == y.isnan()[0].tolist()
    assert bool(y[0, 1:].isfinite().all())


@pytest.mark.parametrize(("table", "pattern"), [("positions", "2:5"), ("columns", "2:2:5"), ("positions", "2:2:5")])
def test_an_index_out_of_range_never_becomes_a_stream(table: str, pattern: str) -> None:
    # An artifact holds tables, not streams: these are checked with every load, hashes or not, before they are packed.
    program = trace(made(Residual), (random(2, 5),))
    module = PassManager.parse(f"mask{{pattern={pattern}}} | freeze | lower").run(program).module
    _fx.get_tensor(module, f"up.weight_{table}").fill_(0xFF)

    with pytest.raises(ArtifactError, match=r"up\.weight: "):
        install_kernels(module)


@pytest.mark.parametrize("level", ["avx512", "sse"])
def test_a_level_that_cannot_run_is_refused_at_load(artifact: Path, level: str) -> None:
    if level in library.supported():
        pytest.skip(f"this processor runs {level}")
    code = f"import sparsec; sparsec.load({str(artifact)!r})"
    env = {**os.environ, "SPARSEC_ISA": level}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)

    assert done.returncode == 1
    assert f"UsageError: SPARSEC_ISA={level}" in done.stderr.splitlines()[-1]


def one(outputs: dict[str, Tensor]) -> Tensor:
    (found,) = outputs.values()
    return found
