"""Pruning an .onnx file: the weights change as the pattern says, and nothing else does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx_files import a_file, array, node, two_layers, weight
from onnx_models import a_layout, packed_model

import sparsec
from sparsec import Artifact, Pattern, inspection
from sparsec.errors import ArtifactError, PatternError, UsageError, VerificationError
from sparsec.onnxfile.weights import weights_of


def prune(path: Path, pattern: str | None = "2:4", **changes: Any) -> Artifact:
    return sparsec.compile(str(path), out=path.with_suffix(".sparsec"), pattern=pattern, **changes)


def site(artifact: Artifact, name: str = "w") -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in artifact.manifest["sites"] if one["name"] == name)
    return found


def nodes_of(path: Path) -> list[bytes]:
    return [one.SerializeToString() for one in onnx.load(path, load_external_data=False).graph.node]


def run(path: Path, x: Any) -> Any:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


PATTERNS = ["2:4", "1:4", "2:5", "3:8", "4:2:5", "2:2:6", "4:2:5+2:4", "unstructured:0.6"]
FORMS = ["Gemm", "Gemm transB", "MatMul", "Transpose", "Conv", "int8"]


def one_layer(path: Path, form: str, rows: int, cols: int, seed: int, external: bool) -> Path:
    dense = np.random.default_rng(seed).standard_normal((rows, cols)).astype("float32")
    given: dict[str, Any] = {"w": dense.T.copy() if form in ("Gemm", "MatMul") else dense}
    nodes = {
        "Gemm": [node("Gemm", ["x", "w"], ["y"])],
        "Gemm transB": [node("Gemm", ["x", "w"], ["y"], transB=1)],
        "MatMul": [node("MatMul", ["x", "w"], ["y"])],
        "Transpose": [node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])],
        "Conv": [node("Relu", ["x"], ["r"]), node("Conv", ["r", "w"], ["y"], group=2)],
        "int8": [
            node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0),
            node("Gemm", ["x", "d"], ["y"], transB=1),
        ],
    }[form]
    if form == "Conv":
        given = {"w": np.random.default_rng(seed).standard_normal((2 * rows, cols, 3)).astype("float32")}
        return a_file(path, nodes, given, x=("batch", 2 * cols, 5), rank=3, external=external)
    if form == "int8":
        zeros = np.random.default_rng(seed).integers(-9, 9, rows).astype("int8")
        scales = np.random.default_rng(seed).uniform(0.01, 0.1, rows).astype("float32")
        given = {"w": (dense * 30).astype("int8"), "s": scales, "z": zeros}
    return a_file(path, nodes, given, x=("batch", cols), external=external)


@settings(max_examples=25)
@given(
    st.sampled_from(FORMS), st.sampled_from(PATTERNS), st.integers(1, 9), st.integers(2, 11), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_a_pruned_weight_is_the_old_one_where_its_mask_is_and_zero_elsewhere(
    form: str, pattern: str, rows: int, cols: int, seed: int, external: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = one_layer(Path(folder) / "m.onnx", form, rows, cols, seed, external)
        ((_, before),) = weights_of(path)
        artifact = prune(path, pattern)
        ((_, after),) = weights_of(artifact.root / "model.onnx")
        parsed = Pattern.parse(pattern)
        mask = parsed.mask(parsed.project(before.abs().float()), before.shape[2])

        assert torch.equal(torch.where(mask, before, 0.0), after)
        assert not parsed.violations(after).count
        onnx.checker.check_model(str(artifact.root / "model.onnx"), full_check=True)
        assert nodes_of(path) == nodes_of(artifact.root / "model.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_everything_but_the_weight_stays_as_it_was(tmp_path: Path, external: bool) -> None:
    path = two_layers(tmp_path / "m.onnx", external)
    artifact = prune(path)
    new = artifact.root / "model.onnx"

    assert nodes_of(path) == nodes_of(new)
    assert ["up", "down", "bias"] == [one.name for one in onnx.load(new).graph.initializer]
    assert all(np.array_equal(array(path, name), array(new, name)) for name in ("down", "bias"))
    assert np.count_nonzero(array(new, "up")) == array(path, "up").size // 2
    assert external == (artifact.root / "model.onnx.data").is_file()


@pytest.mark.parametrize("external", [False, True])
def test_initializers_that_nothing_reads_are_left_out_and_named(tmp_path: Path, external: bool) -> None:
    path = two_layers(tmp_path / "m.onnx", external, original=weight(64, 64))
    artifact = prune(path)

    assert ["original"] == artifact.manifest["dropped"]
    assert "original" not in [one.name for one in onnx.load(artifact.root / "model.onnx").graph.initializer]
    assert sum(f.stat().st_size for f in artifact.root.glob("model.onnx*")) < 64 * 64 * 4


def test_a_pruned_int8_weight_is_its_zero_point(tmp_path: Path) -> None:
    path = one_layer(tmp_path / "m.onnx", "int8", 6, 8, 0, False)
    artifact = prune(path)
    old, new, zeros = (array(path, "w"), array(artifact.root / "model.onnx", "w"), array(path, "z"))

    assert "int8" == new.dtype
    assert ((new == old) | (new == zeros[:, None])).all()
    assert ((new == zeros[:, None]).sum(1) >= 4).all()


def test_half_precision_is_pruned_in_its_own_type(tmp_path: Path) -> None:
    half = numpy_helper.from_array(weight(6, 8).astype("float16"), "w")
    brain = TensorProto()
    brain.CopyFrom(numpy_helper.from_array(weight(6, 8).astype(onnx.helper.tensor_dtype_to_np_dtype(16)), "v"))
    nodes = [
        node("Cast", ["w"], ["a"], to=1),
        node("Cast", ["v"], ["b"], to=1),
        node("Gemm", ["x", "a"], ["c"], transB=1),
        node("Gemm", ["x", "b"], ["d"], transB=1),
        node("Add", ["c", "d"], ["y"]),
    ]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": half, "v": brain})
    artifact = prune(path)

    kept = {one.name: values for one, values in weights_of(artifact.root / "model.onnx")}
    assert {"w": torch.float16, "v": torch.bfloat16} == {name: values.dtype for name, values in kept.items()}
    assert all(int((values != 0).sum()) == 24 for values in kept.values())


def test_a_shared_weight_and_a_constant_are_pruned_once(tmp_path: Path) -> None:
    constant = node("Constant", [], ["c"], value=numpy_helper.from_array(weight(8, 8, seed=3), ""))
    nodes = [constant, node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["b"])]
    nodes += [node("MatMul", ["b", "c"], ["d"]), node("Relu", ["d"], ["y"])]
    artifact = prune(a_file(tmp_path / "m.onnx", nodes, {"w": weight(8, 8)}))

    assert ["the_a", "the_b"] == site(artifact)["users"]
    assert {"w", "c"} == {one["name"] for one in artifact.manifest["sites"] if one["pattern"]}


def test_duplicates_are_pruned_alike_and_reported(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w"], ["a"], transB=1), node("Gemm", ["x", "v"], ["b"], transB=1)]
    path = a_file(tmp_path / "m.onnx", [*nodes, node("Add", ["a", "b"], ["y"])], {"w": weight(6, 8), "v": weight(6, 8)})
    artifact = prune(path)

    assert ["v"] == site(artifact)["same_bytes"]
    assert np.array_equal(array(artifact.root / "model.onnx", "w"), array(artifact.root / "model.onnx", "v"))


def test_a_head_stays_dense_unless_it_is_named(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")

    assert "role head" in site(prune(path), "down")["excluded"]
    named = prune(path, targets={"down": "1:4"}, options=sparsec.Options(force=True))
    assert {"up": "2:4", "down": "1:4"} == {one["name"]: one["pattern"] for one in named.manifest["sites"]}


def test_an_artifact_loads_and_is_proven_again(tmp_path: Path) -> None:
    artifact = prune(two_layers(tmp_path / "m.onnx", external=True))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    found = sparsec.load(artifact.root)(x=x)

    assert np.array_equal(run(artifact.root / "model.onnx", x.numpy()), found["y"].numpy())
    assert all(check.ok for check in sparsec.verify(artifact.root))
    assert {"files", "onnx: well formed", "onnx: patterns", "onnx: outputs in onnxruntime"} == {
        check.name for check in inspection.verify(artifact.root, None)
    }


def test_quality_is_that_of_the_two_files_in_onnxruntime(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")
    quality = prune(path).manifest["quality"]

    assert 0 < quality["relative_error"] < 1
    assert 0 < quality["cosine"] < 1
    assert "4 small inputs made from the types of the graph's inputs" == quality["samples"]
    with pytest.raises(VerificationError, match=r"--min-quality 0\.9999 was asked for; nothing written"):
        sparsec.compile(str(path), out=tmp_path / "other", pattern="2:4", options=sparsec.Options(min_quality=0.9999))
    assert not (tmp_path / "other").exists()


def test_inputs_follow_their_types_and_the_tables_they_look_up(tmp_path: Path) -> None:
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])
    mask = helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "length"])
    nodes = [
        node("Cast", ["mask"], ["m"], to=1),
        node("Unsqueeze", ["m", "last"], ["n"]),
        node("Gather", ["table", "ids"], ["e"]),
        node("Mul", ["e", "n"], ["k"]),
        node("MatMul", ["k", "w"], ["h"]),
        node("Add", ["h", "x"], ["y"]),
    ]
    tensors = {"table": weight(3, 8), "w": weight(8, 8), "last": np.array([-1])}
    path = a_file(tmp_path / "m.onnx", nodes, tensors, x=("batch", "length", 8), inputs=[ids, mask], rank=3)
    artifact = prune(path)
    stored = sparsec.store.load_tensors(artifact.root / "check.safetensors")

    assert (2, 8) == tuple(stored["input:ids"].shape) == tuple(stored["input:mask"].shape)
    assert 0 <= int(stored["input:ids"].min()) <= int(stored["input:ids"].max()) < 3
    assert bool((stored["input:mask"] == 1).all())
    assert "int64[batch, length]" in [entry["type"] for entry in artifact.manifest["inputs"]]


def test_a_file_that_small_inputs_do_not_fit_is_proven_in_structure_and_says_so(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "shape"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"shape": np.array([5, 7, 8]), "w": weight(8, 4)}, x=("n", "m"), rank=3)
    artifact = prune(path)

    assert artifact.manifest["quality"]["words"].startswith("not measured: onnxruntime refused these inputs")
    (said,) = [check for check in sparsec.verify(artifact.root) if "structure" in check.name]
    assert "outputs were not compared, at compile neither" in said.detail
    assert "not measured" in (artifact.root / "README.md").read_text()
    with pytest.raises(VerificationError, match=r"--min-quality 0\.5 cannot be judged"):
        prune(path, options=sparsec.Options(force=True, min_quality=0.5))


def test_a_size_that_is_a_sum_of_others_is_their_sum(tmp_path: Path) -> None:
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", "past", 8])
    both = helper.make_tensor_value_info("both", TensorProto.FLOAT, ["batch", "past + new", 8])
    nodes = [node("Concat", ["past", "x"], ["c"], axis=1), node("Add", ["c", "both"], ["d"])]
    nodes += [node("MatMul", ["d", "w"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": weight(8, 8)}, x=("batch", "new", 8), inputs=[past, both], rank=3)
    artifact = prune(path)

    stored = sparsec.store.load_tensors(artifact.root / "check.safetensors")
    assert (2, 16, 8) == tuple(stored["input:both"].shape)


def test_an_input_that_no_number_fits_is_named(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("text", TensorProto.STRING, ["n"])
    nodes = [node("MatMul", ["x", "w"], ["y"]), node("Identity", ["text"], ["same"])]
    artifact = prune(a_file(tmp_path / "m.onnx", nodes, {"w": weight(8, 4)}, inputs=[text]))

    assert "its input text is string[n]" in artifact.manifest["quality"]["words"]


def test_outputs_that_differ_from_run_to_run_are_no_proof(tmp_path: Path) -> None:
    nodes = [node("RandomNormalLike", ["x"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    artifact = prune(a_file(tmp_path / "m.onnx", nodes, {"w": weight(8, 4)}))

    assert "its output y differs from one run to the next" in artifact.manifest["backends"]["onnx"]["not_run"]


def test_a_file_that_runs_but_does_not_satisfy_the_checker_is_taken_and_says_so(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    path.write_bytes(model.SerializeToString())
    checks = {check.name: check for check in sparsec.verify(prune(path).root)}

    assert "fails the full ONNX checker" in checks["onnx: well formed"].detail
    assert all(check.ok for check in checks.values())


@pytest.mark.parametrize("change", ["pattern", "output"])
def test_verify_finds_a_changed_file(tmp_path: Path, change: str) -> None:
    artifact = prune(two_layers(tmp_path / "m.onnx"))
    path = artifact.root / "model.onnx"
    model = onnx.load(path)
    name = {"pattern": "up", "output": "bias"}[change]
    tensor = next(one for one in model.graph.initializer if one.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(tuple(tensor.dims), "float32"), name))
    path.write_bytes(model.SerializeToString())
    opened = Artifact(artifact.root, artifact.manifest)  # without its hashes
    failed = [check for check in opened.verify() if not check.ok]

    assert {"pattern": "onnx: patterns", "output": "onnx: outputs in onnxruntime"}[change] in [f.name for f in failed]


def test_packed_weights_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(packed_model(a_layout(Pattern.parse("2:4"), 6, 8)))

    with pytest.raises(UsageError, match="no linear weight that 2:4 could be applied to"):
        prune(tmp_path / "m.onnx")
    kind, (found, _) = inspection.inspect(tmp_path / "m.onnx")
    assert ("onnx", ["2:4"]) == (kind, [str(one.pattern) for one in found])


def test_what_cannot_be_pruned_is_refused_by_name_when_it_is_named(tmp_path: Path) -> None:
    stored = helper.make_tensor("w", TensorProto.INT4, (6, 8), [1] * 48)
    nodes = [node("DequantizeLinear", ["w", "s"], ["d"]), node("Gemm", ["x", "d"], ["a"], transB=1)]
    nodes += [node("MatMul", ["a", "v"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": stored, "s": np.float32(0.1), "v": weight(6, 4)})

    with pytest.raises(UsageError, match="w cannot be given a pattern: stored as int4"):
        prune(path, None, targets={"w": "2:4"})
    artifact = prune(path, None, targets={"v": "2:4"})
    assert ["stored as int4: sparsec prunes float and int8 weights; prune before that"] == [
        one["reason"] for one in artifact.manifest["exclusions"]
    ]


def test_nan_is_refused_by_name(tmp_path: Path) -> None:
    bad = weight(8, 12)
    bad[0, 0] = np.nan

    with pytest.raises(PatternError, match="up: the weight holds NaN or Inf"):
        prune(two_layers(tmp_path / "m.onnx", up=bad))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"backends": ["kernel"]}, "found --backend kernel, which needs a graph of PyTorch"),
    ({"backends": ["onnx{weights=packed}"]}, "zeros in place"),
    ({"values": "bf16", "backends": ["onnx"]}, "--values needs a model that sparsec can trace"),
    ({"dtype": "bf16"}, "--dtype needs a model"),
    ({"calibration": "texts.txt"}, "--calib needs a model"),
    ({"passes": "oneshot"}, "without data: expected the passes 'mask | freeze'"),
    ({"passes": "mask{score=wanda} | freeze"}, "for other scores, solvers and passes compile the PyTorch model"),
    ({"pattern": "4:2:5@strip"}, "cannot be proven from weights alone, .* choose 4:2:5"),
    ({"options": sparsec.Options(resume=True)}, "--resume has no meaning for an .onnx file"),
    ({"pattern": None, "targets": {"nothing": "2:4"}}, "matches none of the 2 sites"),
    ({"pattern": None, "targets": {"up": "2:4", "down": "dense"}, "passes": "freeze"}, "expected the passes"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_needs_a_graph_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    two_layers(tmp_path / "m.onnx")
    wanted = {"pattern": "2:4", **changes}

    with pytest.raises(UsageError, match=said):
        sparsec.compile(str(tmp_path / "m.onnx"), out=tmp_path / "out", **wanted)
    assert not (tmp_path / "out").exists()


def test_a_layer_without_pattern_is_not_silently_dense(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "a"], ["h"]), node("MatMul", ["h", "b"], ["k"]), node("Relu", ["k"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"a": weight(8, 8), "b": weight(8, 8, seed=1)})

    with pytest.raises(UsageError, match="1 sites would silently stay dense, the first is b"):
        prune(path, None, targets={"a": "2:4"})
    assert (
        site(prune(path, None, targets={"a": "2:4"}, options=sparsec.Options(allow_dense=True)), "b")["pattern"] is None
    )


def test_the_recipe_in_the_manifest_makes_the_same_file_again(tmp_path: Path) -> None:
    first = prune(two_layers(tmp_path / "m.onnx"), "2:2:6", passes="mask{columns=l1} | freeze")
    again = sparsec.api.compile_recipe(
        sparsec.Recipe.read(first.root / "manifest.json"), tmp_path / "again", sparsec.Options()
    )

    assert (first.root / "model.onnx").read_bytes() == (again.root / "model.onnx").read_bytes()
    patterns = {p.key: p.value for p in onnx.load(again.root / "model.onnx").metadata_props}["sparsec.patterns"]
    assert {"up": "2:2:6"} == json.loads(patterns)


def test_a_broken_graph_is_refused(tmp_path: Path) -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": weight(7, 4)})

    with pytest.raises(ArtifactError, match="is not valid ONNX"):
        prune(path)
