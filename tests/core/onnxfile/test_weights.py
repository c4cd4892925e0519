"""Every weight of an .onnx file is found, whatever stands between it and the product; all others get a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.reference
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import a_file, node, two_layers, weight
from onnx_models import a_layout, packed_model

from sparsec.errors import ArtifactError
from sparsec.layout import decompress
from sparsec.onnxfile.opened import OnnxFile
from sparsec.onnxfile.weights import Weight, survey, weights_of
from sparsec.pattern import Pattern

W = weight(6, 8)  # (outputs, inputs) of most layers here
SCALE, ZERO = np.float32(0.02), np.int8(3)


def only(path: Path) -> tuple[Weight, Any]:
    ((found, values),) = weights_of(path)
    return found, values


def others(path: Path) -> dict[str, str]:
    return {one.name: one.reason for one in survey(OnnxFile(path)).exclusions}


LAYERS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Gemm transB=1": ([node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": W}),
    "Gemm transB=0": ([node("Gemm", ["x", "w"], ["y"])], {"w": W.T.copy()}),
    "MatMul": ([node("MatMul", ["x", "w"], ["y"])], {"w": W.T.copy()}),
    "Transpose, MatMul": ([node("Transpose", ["w"], ["t"]), node("MatMul", ["x", "t"], ["y"])], {"w": W}),
    "weight on the left": (
        [node("Transpose", ["x"], ["t"]), node("MatMul", ["w", "t"], ["y"])],
        {"w": W},
    ),
    "Identity, Cast": (
        [node("Identity", ["w"], ["i"]), node("Cast", ["i"], ["t"], to=1), node("Gemm", ["x", "t"], ["y"], transB=1)],
        {"w": W.astype("float16")},
    ),
    "Reshape": (
        [node("Reshape", ["w", "shape"], ["t"]), node("Gemm", ["x", "t"], ["y"], transB=1)],
        {"w": W.reshape(2, 3, 8), "shape": np.array([-1, 8])},
    ),
    "Unsqueeze, Squeeze": (
        [
            node("Unsqueeze", ["w", "axes"], ["u"]),
            node("Squeeze", ["u", "axes"], ["t"]),
            node("Gemm", ["x", "t"], ["y"], transB=1),
        ],
        {"w": W, "axes": np.array([1])},
    ),
    "Constant": (
        [
            node("Constant", [], ["w"], value=numpy_helper.from_array(W, "inside")),
            node("Gemm", ["x", "w"], ["y"], transB=1),
        ],
        {},
    ),
}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_inputs_are_the_columns_whatever_the_layer_looks_like(tmp_path: Path, layer: str, external: bool) -> None:
    nodes, tensors = LAYERS[layer]
    found, values = only(a_file(tmp_path / "m.onnx", nodes, tensors, external=external))

    assert ("w", (1, 6, 8), ("the_y",)) == (found.name, found.shape, found.users)
    assert torch.equal(torch.from_numpy(W)[None], values.float()) or layer.startswith("Identity")
    assert torch.allclose(torch.from_numpy(W)[None], values.float(), atol=1e-2)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_sums_over_channels_and_its_window(tmp_path: Path, groups: int) -> None:
    kernel = weight(4, 6 // groups, 3)
    nodes = [node("Conv", ["x", "w"], ["c"], group=groups), node("Relu", ["c"], ["y"])]
    found, values = only(a_file(tmp_path / "m.onnx", nodes, {"w": kernel}, x=("batch", 6, 9), rank=3))

    assert (groups, 4 // groups, 18 // groups) == found.shape
    assert torch.equal(torch.from_numpy(kernel).reshape(found.shape), values)
    assert "patch embedding" == found.role


def test_a_stack_of_matrices_is_a_batch(tmp_path: Path) -> None:
    stack = weight(2, 3, 8, 6)
    path = a_file(tmp_path / "m.onnx", [node("MatMul", ["x", "w"], ["y"])], {"w": stack}, x=("b", 3, 5, 8), rank=4)
    found, values = only(path)

    assert (6, 6, 8) == found.shape
    assert torch.equal(torch.from_numpy(stack).reshape(6, 8, 6).transpose(1, 2), values)


ZEROS: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "of the tensor": (SCALE, ZERO, {}),
    "of a channel": (np.linspace(0.01, 0.06, 6, dtype="float32"), np.arange(-3, 3, dtype="int8"), {"axis": 0}),
    "of a block": (
        np.full((6, 2), 0.02, "float32"),
        np.arange(12, dtype="int8").reshape(6, 2),
        {"axis": 1, "block_size": 4},
    ),
}


def dequantized(path: Path, scale: Any, zero: Any, settings: dict[str, int]) -> Path:
    stored = np.random.default_rng(0).integers(-100, 100, (6, 8)).astype("int8")
    nodes = [
        node("DequantizeLinear", ["w", "scale", "zero"], ["d"], **settings),
        node("Transpose", ["d"], ["t"]),
        node("MatMul", ["x", "t"], ["y"]),
    ]
    return a_file(path, nodes, {"w": stored, "scale": scale, "zero": zero})


@pytest.mark.parametrize("zeros", ZEROS)
def test_int8_weights_are_seen_as_they_are_dequantized(tmp_path: Path, zeros: str) -> None:
    path = dequantized(tmp_path / "m.onnx", *ZEROS[zeros])
    (expected,) = onnx.reference.ReferenceEvaluator(str(path)).run(None, {"x": np.eye(8, dtype="float32")})
    found, values = only(path)

    assert ("int8", (1, 6, 8)) == (found.dtype, found.shape)
    np.testing.assert_allclose(expected.T, values[0].numpy(), rtol=1e-6)


def test_a_float_weight_that_is_rounded_in_the_graph_is_found(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", ["w", "scale", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        node("Gemm", ["x", "d"], ["y"], transB=1),
    ]
    found, _ = only(a_file(tmp_path / "m.onnx", nodes, {"w": W, "scale": SCALE, "zero": ZERO}))

    assert "float" == found.dtype


def test_a_weight_of_several_nodes_is_one_weight(tmp_path: Path) -> None:
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Gemm", ["x", "w"], ["b"], transB=1),
        node("Add", ["a", "b"], ["y"]),
    ]
    found, _ = only(a_file(tmp_path / "m.onnx", nodes, {"w": W}))

    assert ("the_a", "the_b") == found.users


def test_a_weight_that_is_multiplied_in_two_ways_has_a_reason(tmp_path: Path) -> None:
    square = weight(8, 8)
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Gemm", ["a", "w"], ["y"], transB=1)]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": square})

    assert "multiplied in two ways" in others(path)["w"]


def test_equal_bytes_under_two_names_are_reported(tmp_path: Path) -> None:
    nodes = [node("Gemm", ["x", "w"], ["a"], transB=1), node("Gemm", ["x", "v"], ["b"], transB=1)]
    nodes += [node("Gemm", ["x", "u"], ["c"], transB=1), node("Sum", ["a", "b", "c"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": W, "v": W, "u": weight(6, 8, seed=9)})

    assert {"w": ("v",), "v": ("w",), "u": ()} == {one.name: one.twins for one in survey(OnnxFile(path)).weights}


def branch(name: str, operator: str, tensor: Any, **settings: Any) -> Any:
    out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])
    inner = [helper.make_node(operator, ["x", f"{name}_w"], [name], **settings)]
    return helper.make_graph(inner, name, [], [out], [numpy_helper.from_array(tensor, f"{name}_w")])


def like_silero(path: Path) -> Path:
    """A layer, and an If whose branches hold a layer each; one of them also reads a weight of the main graph."""
    then = branch("then", "Gemm", W, transB=1)
    orelse = branch("orelse", "MatMul", W.T.copy())
    orelse.node.insert(0, helper.make_node("Gemm", ["x", "shared"], ["unused"], transB=1))
    nodes = [
        node("Gemm", ["x", "w"], ["a"], transB=1),
        node("Gemm", ["x", "shared"], ["b"], transB=1),
        node("If", ["flag"], ["c"], then_branch=then, else_branch=orelse),
        node("Sum", ["a", "b", "c"], ["y"]),
    ]
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    return a_file(path, nodes, {"w": W, "shared": weight(6, 8, seed=5)}, inputs=[flag])


def test_weights_inside_or_read_inside_subgraphs_have_the_reason(tmp_path: Path) -> None:
    path = like_silero(tmp_path / "m.onnx")

    assert ["w"] == [one.name for one, _ in weights_of(path)]
    assert {
        "then_w": "inside If 'the_c': only the main graph is pruned",
        "orelse_w": "inside If 'the_c': only the main graph is pruned",
        "shared": "read inside If 'the_c': only the main graph is pruned",
    } == others(path)


def test_weights_of_functions_have_the_reason(tmp_path: Path) -> None:
    constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(W.T.copy()))
    inner = [constant, helper.make_node("MatMul", ["a", "w"], ["b"]), helper.make_node("Gemm", ["b", "v"], ["c"])]
    opset = [helper.make_opsetid("", 21)]
    function = helper.make_function("own", "Layer", ["a", "v"], ["c"], inner, opset)
    call = node("Layer", ["x", "given"], ["y"], domain="own")
    path = a_file(tmp_path / "m.onnx", [call], {"given": weight(6, 4)}, domains=["own"], functions=[function])

    assert "read by own::Layer" in others(path)["given"]
    assert "inside the function own::Layer" in others(path)["w"]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT4, TensorProto.UINT4])
def test_types_without_a_zero_in_place_are_named_and_skipped(tmp_path: Path, kind: int) -> None:
    stored = helper.make_tensor("w", kind, (6, 8), np.ones((6, 8)).flatten().tolist())
    nodes = [node("DequantizeLinear", ["w", "scale"], ["d"]), node("Gemm", ["x", "d"], ["y"], transB=1)]
    path = a_file(tmp_path / "m.onnx", nodes, {"w": stored, "scale": SCALE})

    assert f"stored as {TensorProto.DataType.Name(kind).lower()}" in others(path)["w"]


def test_weights_of_blocks_of_4_bits_are_named_and_skipped(tmp_path: Path) -> None:
    stored = np.zeros((6, 1, 8), "uint8")
    call = node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=16, N=6, bits=4, block_size=16)
    path = a_file(
        tmp_path / "m.onnx", [call], {"w": np.repeat(stored, 2, 1), "s": np.ones(6, "float32")},
        x=("batch", 16), domains=["com.microsoft"],
    )  # fmt: skip

    assert "stored as blocks of 4 bits" in others(path)["w"]


def test_other_operators_are_named(tmp_path: Path) -> None:
    nodes = [node("Gather", ["table", "i"], ["g"]), node("Add", ["x", "full"], ["a"]), node("Add", ["a", "g"], ["y"])]
    path = a_file(tmp_path / "m.onnx", nodes, {"table": W, "i": np.array([0]), "full": weight(2, 8), "lost": W})

    assert "an embedding table" in others(path)["table"]
    assert "read by Add" in others(path)["full"]
    assert "no node reads it" == others(path)["lost"]


@pytest.mark.parametrize(("ends", "role"), [(["Softmax"], "head"), (["Tanh"], "linear"), ([], "head")])
def test_the_last_layer_is_a_head_where_the_output_is_its_own(tmp_path: Path, ends: list[str], role: str) -> None:
    nodes = [node("MatMul", ["x", "up"], ["a"]), node("Gemm", ["a", "down"], ["b"], transB=1)]
    nodes += [node(ends[0], ["b"], ["y"])] if ends else [node("Add", ["b", "bias"], ["y"])]
    tensors = {"up": weight(8, 12), "down": weight(6, 12), "bias": weight(6)}
    found = survey(OnnxFile(a_file(tmp_path / "m.onnx", nodes, tensors))).weights

    assert ["linear", role] == [one.role for one in found]


def test_a_depthwise_convolution_a_router_and_a_pooler_have_their_roles(tmp_path: Path) -> None:
    nodes = [
        node("Relu", ["x"], ["r"]),
        node("Conv", ["r", "deep"], ["c"], group=4),
        node("Gather", ["c", "first"], ["g"], axis=2),
        node("Gemm", ["g", "pool", "bias"], ["p"], transB=1),
        node("Tanh", ["p"], ["t"]),
        node("MatMul", ["t", "route"], ["m"]),
        node("Softmax", ["m"], ["s"]),
        node("TopK", ["s", "one"], ["y", "i"]),
    ]
    tensors = {"deep": weight(4, 1, 3), "pool": weight(4, 4), "bias": weight(4), "route": weight(4, 5)}
    indices = {"first": np.array(0), "one": np.array([1])}
    path = a_file(tmp_path / "m.onnx", nodes, tensors | indices, x=("b", 4, 9))
    found = {one.name: one.role for one in survey(OnnxFile(path)).weights}

    assert {"deep": "depthwise", "pool": "pooler", "route": "router"} == found


def test_a_tied_embedding_is_a_weight_that_stays_dense_by_default(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["w", "i"], ["g"]),
        node("Gemm", ["x", "w"], ["b"], transB=1),
        node("Add", ["b", "s"], ["c"]),
    ]
    nodes += [node("MatMul", ["g", "v"], ["h"]), node("Add", ["c", "h"], ["y"])]
    tensors = {"w": W, "i": np.array([0]), "s": weight(6), "v": weight(8, 6)}
    found = survey(OnnxFile(a_file(tmp_path / "m.onnx", nodes, tensors))).weights

    assert {"w": "tied embedding", "v": "linear"} == {one.name: one.role for one in found}


@pytest.mark.parametrize("pattern", ["2:4", "4:2:5", "3:8"])
def test_packed_tables_are_a_weight(tmp_path: Path, pattern: str) -> None:
    layout = a_layout(Pattern.parse(pattern), 6, 17)
    (tmp_path / "m.onnx").write_bytes(packed_model(layout))
    found, values = only(tmp_path / "m.onnx")

    assert (pattern, (1, 6, 17), "NMLinear") == (str(found.packed), found.shape, found.kind)
    assert torch.equal(decompress(layout), values)


def test_a_damaged_table_is_an_error(tmp_path: Path) -> None:
    layout = a_layout(Pattern.parse("4:2:5"), 6, 17)
    wrong = np.full_like(layout.columns.numpy(), 200)  # type: ignore[union-attr]
    (tmp_path / "m.onnx").write_bytes(packed_model(layout, change={"columns": wrong}))

    with pytest.raises(ArtifactError, match="column"):
        only(tmp_path / "m.onnx")


def test_external_data_is_read_one_weight_at_a_time(tmp_path: Path) -> None:
    path = two_layers(tmp_path / "m.onnx", external=True)
    each = weights_of(path)
    next(each)
    (tmp_path / "m.onnx_data").write_bytes(b"")

    with pytest.raises(ArtifactError, match=r"down lies at bytes .* of m\.onnx_data, which has 0"):
        next(each)
