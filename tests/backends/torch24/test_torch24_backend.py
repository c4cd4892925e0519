"""2:4 on torch's kernels: what is refused, what is written, and what is proven of it without a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated24 import compressed, kernels
from hypothesis import given
from hypothesis import strategies as st
from models import Residual, made, random
from strategies import weights
from torch import Tensor, nn
from torch.nn import functional
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

import sparsec
from sparsec import PassManager, _fx, store, trace
from sparsec.backend import CheckData, tolerance_of
from sparsec.backends.torch24.backend import Torch24Backend
from sparsec.backends.torch24.checks import conversion_fault
from sparsec.backends.torch24.runtime import CudaModule, install
from sparsec.errors import ArtifactError, PatternError, UsageError
from sparsec.layout import compress, decompress
from sparsec.pattern import Pattern
from sparsec.program import Program, read_graph
from sparsec.semi_structured import multiples, takes

BF16_OF_64 = 2e-2  # two layers of 64 products, each rounded to 8 bits, of the largest output
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")


class Net(nn.Module):
    """Layers of every kind: both kernels take `both`, `crooked` fits cuSPARSELt only, `narrow` and `conv` neither."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.crooked = nn.Linear(64, 64), nn.Linear(64, 48, bias=False)
        self.narrow, self.conv = nn.Linear(48, 20), nn.Conv1d(20, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.both(x.transpose(0, 1)))  # not contiguous
        hidden = self.narrow(self.crooked(hidden))
        return self.conv(hidden.transpose(1, 2)) + torch.arange(hidden.shape[1], dtype=x.dtype)


class Square(nn.Module):
    """One layer that both kernels take."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def frozen(model: nn.Module, x: Tensor, pattern: str, dynamic: Any = None) -> Program:
    program = trace(model, {"x": x}, dynamic)
    program = program.replace(sites=program.sites.with_targets({"*": pattern}))
    return PassManager.parse("mask | freeze").run(program)


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def program(request: pytest.FixtureRequest) -> Program:
    dynamic = {"x": {0: "batch", 1: "length"}}
    return frozen(made(Net).to(request.param), random(2, 3, 64).to(request.param), "2:4", dynamic)


def manifest_of(program: Program) -> dict[str, Any]:
    sites = [{"name": site.name, "pattern": str(site.pattern)} for site in program.sites.sparse]
    return {"sites": sites, "tolerance": tolerance_of(program)}


def written(program: Program, folder: Path) -> tuple[Path, dict[str, Any], CheckData]:
    Torch24Backend().emit(program, folder)
    with torch.no_grad():
        return folder, manifest_of(program), CheckData(program.inputs, program(**program.inputs))


def one(outputs: dict[str, Tensor]) -> Tensor:
    (found,) = outputs.values()
    return found


# What is refused, and what runs dense


def test_float32_models_are_refused_before_any_pass_with_the_types_to_ask_for() -> None:
    reason = Torch24Backend().refuses(trace(made(Residual), {"x": random(2, 5)}))

    assert reason is not None and "found float32 weights; add --dtype bf16 or --dtype fp16" in reason


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [("4:2:5", "add --also"), ("4:8", "add --also"), ("4:2:8@strip", "choose"), ("unstructured:0.5", "choose")],
)
def test_patterns_that_are_not_2_of_4_are_refused_with_advice(pattern: str, advice: str, tmp_path: Path) -> None:
    program = frozen(made(Square).bfloat16(), random(2, 64).bfloat16(), pattern)

    with pytest.raises(PatternError, match=f"layer.weight: torch runs only 2:4 sparse, found {pattern}; {advice} 2:4"):
        Torch24Backend().emit(program, tmp_path)
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:2:4", "32:2:8", "64:2:5+2:4"])
def test_patterns_that_imply_2_of_4_are_taken(pattern: str) -> None:
    program = frozen(made(Square).bfloat16(), random(2, 64).bfloat16(), pattern)

    assert Torch24Backend().refuses(program) is None


def test_each_site_has_its_kernel_or_the_reason_why_it_runs_dense(program: Program) -> None:
    verdicts = {v.site: (v.sparse, v.kernel, v.reason) for v in Torch24Backend().plan(program)}

    assert (True, "cuSPARSELt or CUTLASS", "") == verdicts["both.weight"]
    assert (
        True,
        "cuSPARSELt",
        "dense where torch has no cuSPARSELt: CUTLASS takes multiples of 32 rows and 64 columns",
    ) == verdicts["crooked.weight"]
    assert (
        False,
        "dense",
        "its weight is 20 x 48; torch's 2:4 kernels take multiples of 16 rows and 16 columns",
    ) == verdicts["narrow.weight"]
    assert (
        False,
        "dense",
        "it is no plain linear layer, and torch's 2:4 kernels have no other",
    ) == verdicts["conv.weight"]


def test_a_weight_kept_in_float32_among_others_runs_dense_with_the_reason() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.full = nn.Linear(64, 64).bfloat16(), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.full(self.low(x).float()).tanh()

    verdicts = {v.site: v for v in Torch24Backend().plan(frozen(Mixed(), random(2, 64).bfloat16(), "2:4"))}

    assert verdicts["low.weight"].sparse
    assert verdicts["full.weight"].reason.endswith("take float16 and bfloat16; its weight is torch.float32")


# torch's conversion


@st.composite
def two_of_four(draw: st.DrawFn, pattern: str = "") -> tuple[Tensor, Pattern]:
    """A weight (1, rows, cols) of a legal shape, fp16 or bf16, and its pattern."""
    chosen = Pattern.parse(pattern or draw(st.sampled_from(["2:4", "1:4", "2:8", "4:2:8", "64:2:4", "3:2:12"])))
    shape = (1, 16 * draw(st.integers(1, 6)), 16 * draw(st.integers(1, 6)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16]))
    weight = draw(weights(shape)).clamp(-6e4, 6e4).to(dtype)
    return weight, chosen


@given(two_of_four())
def test_torchs_conversion_keeps_every_bit_of_every_legal_shape(drawn: tuple[Tensor, Pattern]) -> None:
    weight, pattern = drawn
    sparse = decompress(compress(weight, pattern, pattern.project(weight.abs())))

    assert conversion_fault(sparse[0]) is None


@given(two_of_four("2:4"))
def test_stored_positions_are_torchs_metadata_word_by_word(drawn: tuple[Tensor, Pattern]) -> None:
    weight, pattern = drawn
    rows, cols = weight.shape[1] * 2, weight.shape[2] * 2  # CUTLASS takes multiples of 32
    weight = torch.cat([weight, weight.flip(1)], 1)
    weight = torch.cat([weight, weight.flip(2)], 2)
    weight = torch.where(weight == 0, 1.0, weight.float()).to(weight.dtype)  # torch chooses freely between zeros
    layout = compress(weight, pattern, pattern.project(weight.abs()))
    _, metadata = sparse_semi_structured_from_dense_cutlass(decompress(layout)[0])

    stored = layout.positions[0].contiguous().view(torch.int16)  # four groups of two 2-bit positions a word
    expected = torch.empty(rows * cols // 16, dtype=torch.int16)
    for row in range(rows):
        for word in range(cols // 16):
            expected[cutlass_place(row, word, rows)] = stored[row, word]
    assert torch.equal(expected, metadata.flatten())


def cutlass_place(row: int, column: int, rows: int) -> int:
    """Where CUTLASS keeps a 16-bit metadata word: rows dealt out by 8, 2 x 2 blocks turned, two columns interleaved."""
    row = row // 32 * 32 + row % 8 * 4 + row % 32 // 8
    if row % 2 != column % 2:
        row, column = (row + 1, column - 1) if column % 2 else (row - 1, column + 1)
    return column // 2 * 2 * rows + row * 2 + column % 2


def test_a_weight_that_is_not_2_of_4_is_seen_in_torchs_metadata() -> None:
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[3, 4:7] = 1

    assert "torch's metadata leaves out a weight that is kept" == conversion_fault(weight)


def test_other_bits_are_seen() -> None:
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[3, 4] = -0.0

    assert "torch's conversion and back gives other bits" == conversion_fault(weight)


def test_what_the_kernels_take_is_what_torch_says() -> None:
    assert ((16, 16), (32, 64)) == (multiples("cuSPARSELt", torch.float16), multiples("CUTLASS", torch.bfloat16))
    assert takes("cuSPARSELt", torch.float16, 48, 80) and not takes("CUTLASS", torch.float16, 48, 80)
    assert not takes("cuSPARSELt", torch.float32, 64, 64)


# What is written, proven and loaded


def test_what_is_written_is_proven_without_a_gpu(program: Program, tmp_path: Path) -> None:
    folder, manifest, check = written(program, tmp_path)

    checks = {c.name: c for c in Torch24Backend().verify(folder, manifest, check)}

    assert all(c.ok for c in checks.values())
    assert "4 sites satisfy their pattern and 2:4, bit for bit" == checks["torch24: pattern"].detail
    assert checks["torch24: metadata"].detail.startswith("torch's conversion keeps all bits of 2 sites")
    assert {"graph.json", "weights.safetensors"} == {path.name for path in (folder / "torch24").iterdir()}


@no_gpu
def test_a_proof_without_a_gpu_says_that_the_kernels_were_not_run(program: Program, tmp_path: Path) -> None:
    checks = Torch24Backend().verify(*written(program, tmp_path))

    assert checks[-1].detail.endswith("; no CUDA GPU here, so torch's 2:4 kernels were not run")


@no_gpu
def test_loading_without_a_gpu_says_what_is_needed(program: Program, tmp_path: Path) -> None:
    folder, manifest, _ = written(program, tmp_path)

    with pytest.raises(UsageError, match=r"compute capability 8.0 or newer, and torch .* finds no CUDA GPU; find a"):
        Torch24Backend().load(folder, manifest)


@gpu
def test_a_gpu_gives_what_the_masked_model_gives(program: Program, tmp_path: Path) -> None:
    checks = Torch24Backend().verify(*written(program, tmp_path))

    assert "torch24: outputs on the GPU" == checks[-1].name
    assert all(c.ok for c in checks)


def test_a_weight_changed_after_it_was_written_is_found(program: Program, tmp_path: Path) -> None:
    folder, manifest, check = written(program, tmp_path)
    path = folder / "torch24" / store.WEIGHTS
    tensors = store.load_tensors(path)
    tensors["both.weight_values"] *= 1.5
    store.save_tensors(path, tensors)

    failed = [c.name for c in Torch24Backend().verify(folder, manifest, check) if not c.ok]

    assert ["torch24: outputs, dense on the CPU"] == failed


def test_a_pattern_other_than_declared_is_found(program: Program, tmp_path: Path) -> None:
    folder, manifest, check = written(program, tmp_path)
    manifest["sites"][0]["pattern"] = "32:2:8"

    failed = [c.detail for c in Torch24Backend().verify(folder, manifest, check) if not c.ok]

    assert ["both.weight: declared 32:2:8, stored 2:4 (and 1 more)"] == failed  # it breaks what is declared, too


def test_a_compile_for_patterns_that_are_not_2_of_4_is_refused_by_the_sites_name(tmp_path: Path) -> None:
    inputs, out = (random(2, 64).bfloat16(),), tmp_path / "net.sparsec"

    with pytest.raises(UsageError, match=r"^backend torch24 cannot write this model: layer.weight: torch runs only"):
        sparsec.compile(made(Square).bfloat16(), inputs, pattern="4:2:5", backends=("torch24",), out=out)
    assert not out.exists()


@pytest.mark.parametrize(("pattern", "backends"), [("32:2:8", ("kernel", "torch24")), ("64:2:5+2:4", ("torch24",))])
def test_compiled_artifacts_hold_it_alone_or_beside_others(
    tmp_path: Path, pattern: str, backends: tuple[str, ...]
) -> None:
    inputs, out = (random(2, 64).bfloat16(),), tmp_path / "net.sparsec"

    artifact = sparsec.compile(made(Square).bfloat16(), inputs, pattern=pattern, backends=backends, out=out)

    assert all(check.ok for check in artifact.verify())
    assert backends == artifact.backends
    (site,) = artifact.manifest["sites"]
    assert "cuSPARSELt or CUTLASS" == site["verdicts"]["torch24"]["kernel"]


# The graph on the GPU, with the product of torch's CUTLASS tensor emulated


@pytest.mark.parametrize("shape", [(2, 3, 64), (1, 1, 64), (3, 8, 64)])
def test_torchs_tensors_run_in_the_graph(program: Program, tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder, manifest, check = written(program, tmp_path)
    device = torch.device("cpu")
    x = random(*shape, seed=1).to(check.inputs["x"].dtype)

    with kernels() as calls:
        graph = install(read_graph(folder / "torch24").requires_grad_(False), device, "CUTLASS", compressed)
        found = one(CudaModule(graph, manifest, device)(x))

    with torch.no_grad():
        expected = one(program(x))
    assert expected.dtype == found.dtype
    assert float((found - expected).abs().max() / expected.abs().max()) < BF16_OF_64
    tokens = shape[0] * shape[1]
    assert [(64, tokens + -tokens % 8)] == calls  # `both` alone: CUTLASS takes none of the others


def test_no_tokens_reach_no_kernel(program: Program, tmp_path: Path) -> None:
    folder, manifest, check = written(program, tmp_path)
    device = torch.device("cpu")

    with kernels() as calls:
        graph = install(read_graph(folder / "torch24").requires_grad_(False), device, "CUTLASS", compressed)
        found = one(CudaModule(graph, manifest, device)(check.inputs["x"][:, :0]))

    assert ((0, 16, 2), []) == (tuple(found.shape), calls)


def test_weights_that_run_dense_on_this_gpu_are_named(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _, _ = written(program, tmp_path)

    with caplog.at_level(logging.INFO, "sparsec"):
        install(read_graph(folder / "torch24"), torch.device("cpu"), "CUTLASS", compressed)

    assert ["3 of the sparse weights run dense on this GPU, the first is conv.weight"] == caplog.messages


def test_a_weight_that_is_not_2_of_4_is_not_given_to_a_kernel() -> None:
    lowered = PassManager.parse("lower").run(frozen(made(Square).half(), random(2, 64).half(), "4:2:5"))

    with pytest.raises(ArtifactError, match=r"layer.weight is not 2:4: row 0, group"):
        install(lowered.module, torch.device("cpu"), "CUTLASS", compressed)


def test_a_moved_graph_leaves_nothing_behind(program: Program, tmp_path: Path) -> None:
    """Run on torch's meta device: a tensor left on, or made on, the CPU is an error there."""
    folder, _, check = written(program, tmp_path)
    module, meta = read_graph(folder / "torch24"), torch.device("meta")

    _fx.move(module, meta)

    assert meta == one(module(check.inputs["x"].to(meta))).device
