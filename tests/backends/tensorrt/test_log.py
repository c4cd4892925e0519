"""What build logs say. The first line of each golden log says where it is from."""

from __future__ import annotations

import doctest

import pytest
from tensorrt_models import GOLDEN

from sparsec.backends.tensorrt import judge, profiles
from sparsec.backends.tensorrt import log as log_module
from sparsec.backends.tensorrt.log import BuildLog, Layers, nodes_of, parse


def log(name: str) -> BuildLog:
    return parse((GOLDEN / name).read_text())


def test_the_wording_of_tensorrt_8_to_10_is_read() -> None:
    found = log("tensorrt-8-to-10.txt")

    fused = ("node_Gemm_2 + node_relu", "node_Gemm_8", "PWN(Sigmoid_3, Mul_4)", "node_Gemm_14")
    assert Layers(4, fused) == found.eligible
    assert Layers(1, ("node_Gemm_8",)) == found.chosen
    assert found.layers == ()


def test_an_empty_list_means_that_no_layer_was_picked() -> None:
    found = log("tensorrt-8-none-picked.txt")

    assert Layers(2, ("node_Gemm_2", "node_Gemm_8")) == found.eligible
    assert Layers(0, ()) == found.chosen
    assert found.chosen.named


def test_the_wording_of_tensorrt_10_and_11_is_read_and_the_last_pass_counts() -> None:
    found = log("tensorrt-10-11.txt")

    merged = "node_Gemm_14+node_Gemm_8_myl0_2"
    assert Layers(4, (merged, "node_Gemm_20", "node_Gemm_26", "node_Gemm_32")) == found.eligible
    assert Layers(2, (merged, "node_Gemm_26")) == found.chosen
    assert found.chosen.include("node_Gemm_8")
    assert not found.chosen.include("node_Gemm_2")


def test_counts_without_names_are_not_taken_for_a_list() -> None:
    found = log("tensorrt-11-counts.txt")

    assert (39, 4) == (found.eligible.count, found.chosen.count)
    assert not found.eligible.named
    assert not found.chosen.named


def test_engine_layers_say_what_runs_a_node() -> None:
    merged, dense, plugin = log("tensorrt-10-11.txt").layers

    assert ("node_Gemm_14", "node_Gemm_8") == merged.nodes
    assert [True, False, False] == [layer.sparse for layer in (merged, dense, plugin)]
    assert [False, False, True] == [layer.plugin for layer in (merged, dense, plugin)]


def test_an_rtx_log_names_layers_and_says_nothing_of_sparsity() -> None:
    found = log("rtx-1.7.txt")

    assert found.eligible is None
    assert found.chosen is None
    assert ["shape_call", "runtime_fusion", "gemm", "kgen"] == [layer.kind for layer in found.layers]
    assert ("node_gelu", "node_Gemm_2") == found.layer_of("node_Gemm_2").nodes


def test_the_layer_of_a_node_is_the_one_that_multiplies() -> None:
    assert "gemm" == log("rtx-1.7.txt").layer_of("node_Gemm_8").kind  # its bias is added in another one
    assert log("rtx-1.7.txt").layer_of("node_Gemm_99") is None


def test_a_log_without_a_word_about_sparsity_says_nothing() -> None:
    assert BuildLog(None, None, ()) == parse("[I] Engine generation completed in 3 seconds.\n")


@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("node_Gemm_7", {"node_Gemm_7"}),
        ("Conv_1 + Relu_2", {"Conv_1", "Relu_2"}),
        ("/model/layer.0/MatMul", {"/model/layer.0/MatMul"}),
        ("node_Gemm_71+node_Gemm_59+node_Gemm_47_myl0_2", {"node_Gemm_71", "node_Gemm_59", "node_Gemm_47"}),
        ("{ForeignNode[node_a...node_b]}", {"ForeignNode", "node_a", "node_b"}),
    ],
)
def test_the_name_of_a_layer_mentions_its_nodes_whole(name: str, nodes: set[str]) -> None:
    assert nodes == nodes_of(name)


def test_the_examples_in_docstrings_hold() -> None:
    results = [doctest.testmod(module) for module in (log_module, profiles, judge)]

    assert [0, 0, 0] == [result.failed for result in results]
    assert all(result.attempted for result in results)
