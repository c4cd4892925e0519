"""The layer table: every reason why a site does not run sparse."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tensorrt_models import GOLDEN

from sparsec.backends.tensorrt.layers import NOT_BUILT, RTX_CANNOT_SAY, Row, summary, table
from sparsec.backends.tensorrt.log import BuildLog, parse
from sparsec.backends.tensorrt.network import Network, Product, Target

SITE = Target("up.weight", "linear", (0, 1), (1, 512, 320), "2:4", "")
PRODUCT = Product(SITE, "node_Gemm_8", "float16", 320, 512, True)
NOTHING = BuildLog(None, None, ())


def golden(name: str) -> BuildLog:
    return parse((GOLDEN / name).read_text())


def row(log: BuildLog, built: str = "tensorrt", precision: str = "model", **changes: object) -> Row:
    target = dataclasses.replace(SITE, **{k: changes.pop(k) for k in ("pattern", "dense_because") if k in changes})
    (found,) = table([dataclasses.replace(PRODUCT, target=target, **changes)], log, built, precision)
    return found


def test_a_layer_that_the_log_says_was_chosen_runs_sparse() -> None:
    for name in ("tensorrt-8-to-10.txt", "tensorrt-10-11.txt"):
        found = row(golden(name))

        assert (True, True, "") == (found.eligible, found.chosen, found.why)
    assert "node_Gemm_14+node_Gemm_8_myl0_2" == found.engine_layer
    assert "sparse_gemm" in (found.tactic or "")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"node": "node_Gemm_20"}, "its dense kernel was faster when TensorRT timed both"),
        ({"node": "node_Gemm_20", "inputs": 256}, "256 inputs and 512 outputs, and sparse kernels win where both are"),
        ({"node": "node_Gemm_20", "dtype": "float"}, "compile with --dtype fp16"),
        ({"node": "node_Gemm_20", "dtype": "int8", "quantized": True}, "Q/DQ without an int8 epilogue"),
        ({"node": "node_Gemm_20", "dtype": "int8", "quantized": True, "int8_out": True}, "dense kernel was faster"),
    ],
)
def test_an_eligible_layer_that_was_not_chosen_says_why(changes: dict[str, object], why: str) -> None:
    found = row(golden("tensorrt-10-11.txt"), **changes)

    assert (True, False) == (found.eligible, found.chosen)
    assert why in found.why


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pattern": None, "dense_because": "the pooler"}, "dense: the pooler"),
        ({"node": None}, "no Gemm, MatMul or Conv"),
        ({"two_of_four": False}, "not 2:4 along its 320 inputs"),
        ({"inputs": 322}, "its 322 inputs are not divisible by 4"),
        ({"outputs": 9}, "its 9 outputs are not divisible by 4"),
        ({"node": "node_Gemm_38"}, "the plugin node_Gemm_38 runs it"),
        ({"node": "node_Gemm_50"}, "TensorRT did not list it as eligible"),
        ({"node": "node_Gemm_50", "dtype": "float"}, "compile with --dtype fp16"),
    ],
)
def test_a_layer_that_is_not_eligible_says_why(changes: dict[str, object], why: str) -> None:
    found = row(golden("tensorrt-10-11.txt"), **changes)

    assert (False, False) == (found.eligible, found.chosen)
    assert why in found.why


def test_the_sparse_kernel_that_is_named_is_proof_without_a_list() -> None:
    counts = golden("tensorrt-11-counts.txt")
    named = BuildLog(counts.eligible, counts.chosen, golden("tensorrt-10-11.txt").layers)

    assert row(named).chosen is True
    assert row(counts).chosen is None
    assert "counts 4 sparse layers and names none" in row(counts).why


def test_what_is_not_known_is_not_claimed() -> None:
    assert RTX_CANNOT_SAY == row(golden("rtx-1.7.txt"), "rtx").why
    assert NOT_BUILT == row(NOTHING, "none").why
    assert "has no (Sparsity) line" in row(NOTHING).why
    assert [None] * 3 == [row(NOTHING, built).chosen for built in ("rtx", "none", "tensorrt")]


def test_a_precision_beside_the_files_own_counts() -> None:
    assert (
        "dense kernel was faster"
        in row(golden("tensorrt-10-11.txt"), precision="fp16", dtype="float", node="node_Gemm_20").why
    )


def test_the_summary_counts_what_is_known() -> None:
    log = golden("tensorrt-10-11.txt")
    rows = [row(log), row(log, node="node_Gemm_20"), row(log, pattern=None)]

    assert "2 of 3 products are eligible for 2:4, 1 of them run sparse" == summary(rows)
    assert "1 of 1 products are eligible for 2:4, not known how many run sparse" == summary([row(NOTHING, "rtx")])


def pruned(rows: int, cols: int) -> np.ndarray:
    weight = np.random.default_rng(0).normal(size=(rows, cols)).astype("float32")
    weight[:, 2::4] = weight[:, 3::4] = 0
    return weight


def saved(path, nodes: list, weights: dict[str, np.ndarray]) -> Network:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path / "model.onnx")
    return Network(path / "model.onnx")


def test_a_weight_is_followed_to_the_node_that_multiplies(tmp_path) -> None:
    target = Target("w", "conv1d_hf", (1, 0), (1, 4, 8), "2:4", "")  # [in, out] in the file
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], name="turn"),
        helper.make_node("MatMul", ["x", "w"], ["a"], name="straight"),
        helper.make_node("Gemm", ["x", "t"], ["b"], name="turned", transB=1),
    ]

    found = saved(tmp_path, nodes, {"w": np.ascontiguousarray(pruned(4, 8).T)}).products([target])

    assert ["turned", "straight"] == [one.node for one in found]
    assert {(8, 4, True, "float")} == {(one.inputs, one.outputs, one.two_of_four, one.dtype) for one in found}


def test_a_dense_weight_and_a_missing_one_are_not_2_of_4(tmp_path) -> None:
    site = Target("w", "linear", (0, 1), (1, 8, 8), "2:4", "")
    network = saved(tmp_path, [helper.make_node("Gemm", ["x", "w"], ["y"])], {"w": np.ones((8, 8), "float32")})
    (dense, missing) = network.products([site, dataclasses.replace(site, name="gone")])

    assert not dense.two_of_four
    assert missing.node is None


def test_a_convolution_must_be_2_of_4_along_its_channels(tmp_path) -> None:
    along_kernel = torch.ones(4, 4, 4)
    along_kernel[:, :, 2:] = 0  # 2 of 4 along the flattened (channels, kernel), not along the channels
    along_channels = torch.ones(4, 4, 3)
    along_channels[:, 2:] = 0
    sites = [Target(name, "conv1d", (0, 1, 2), (1, 4, 16), "2:4", "") for name in ("kernel", "channels")]
    nodes = [helper.make_node("Conv", ["x", name], [f"{name}_y"], name=name) for name in ("kernel", "channels")]
    network = saved(tmp_path, nodes, {"kernel": along_kernel.numpy(), "channels": along_channels.numpy()})

    assert [False, True] == [one.two_of_four for one in network.products(sites)]


def test_quantized_weights_are_recognised_with_and_without_an_int8_epilogue(tmp_path) -> None:
    scale, zero = np.array(0.1, "float32"), np.array(0, "int8")
    nodes = [
        helper.make_node("DequantizeLinear", ["w_quantized", "s", "z"], ["d"], name="dequantize"),
        helper.make_node("Gemm", ["x", "d"], ["a"], name="then_quantized", transB=1),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"]),
        helper.make_node("Gemm", ["x", "d"], ["y"], name="left_float", transB=1),
    ]
    weights = {"w_quantized": pruned(8, 8).astype("int8"), "s": scale, "z": zero}

    found = saved(tmp_path, nodes, weights).products([Target("w", "linear", (0, 1), (1, 8, 8), "2:4", "")])

    assert [("then_quantized", True, True), ("left_float", True, False)] == [
        (one.node, one.quantized, one.int8_out) for one in found
    ]


def test_bfloat16_weights_are_read_bit_for_bit(tmp_path) -> None:
    weight = torch.from_numpy(pruned(8, 8)).to(torch.bfloat16)
    tensor = helper.make_tensor("w", TensorProto.BFLOAT16, [8, 8], weight.view(torch.int16).numpy().tobytes(), raw=True)
    graph = helper.make_graph([helper.make_node("Gemm", ["x", "w"], ["y"])], "g", [], [], [tensor])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")

    assert torch.equal(
        weight, Network(tmp_path / "model.onnx").weight(Target("w", "linear", (0, 1), (1, 8, 8), "", ""))
    )
