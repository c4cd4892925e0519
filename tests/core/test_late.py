"""A late module writes its code when it is needed, and is a graph module in all else."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from models import Residual, made, random
from torch.fx import GraphModule

from sparsec import _fx, late, trace


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every module whose code is written."""
    calls, real = [], GraphModule.recompile

    def recompile(module: GraphModule) -> object:
        calls.append("written")
        return real(module)

    monkeypatch.setattr(GraphModule, "recompile", recompile)
    return calls


def test_code_is_written_at_the_first_call_and_once_for_several_edits(written: list[str]) -> None:
    program = trace(made(Residual), (random(2, 5),))
    written.clear()
    twin = program.clone()
    for node in _fx.calls(twin.module.graph, torch.ops.aten.gelu.default):
        _fx.replace(node, node.all_input_nodes[0])
        twin.module.recompile()
    twin.module.recompile()
    assert [] == written

    x = random(2, 5)
    first = twin(x)["output"]
    assert not torch.equal(program(x)["output"], first)
    assert torch.equal(first, twin(x)["output"])
    assert ["written"] == written


def test_an_edit_after_a_call_is_seen_by_the_next() -> None:
    twin, x = trace(made(Residual), (random(2, 5),)).clone(), random(2, 5)
    before = twin(x)["output"]
    for node in _fx.calls(twin.module.graph, torch.ops.aten.gelu.default):
        _fx.replace(node, node.all_input_nodes[0])
    twin.module.recompile()

    assert not torch.equal(before, twin(x)["output"])


@pytest.mark.parametrize("look", [
    lambda module: "gelu" in module.code,
    lambda module: "gelu" in str(module),
    lambda module: ["x"] == list(inspect.signature(module.forward).parameters),
], ids=["code", "str", "signature"])  # fmt: skip
def test_who_looks_at_the_code_finds_that_of_the_graph(look: object) -> None:
    assert callable(look) and look(trace(made(Residual), (random(2, 5),)).clone().module)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), late.copy_of],
                         ids=["deepcopy", "pickle", "copy_of"])  # fmt: skip
def test_a_copy_gives_the_same_outputs(again: object) -> None:
    twin, x = trace(made(Residual), (random(2, 5),)).clone(), random(2, 5)

    assert callable(again) and torch.equal(twin(x)["output"], twin.replace(module=again(twin.module))(x)["output"])


def test_a_copy_shares_all_tensors_those_that_no_node_reads_too() -> None:
    program = trace(made(Residual), (random(2, 5),))
    _fx.set_tensor(program.module, "spare.table", torch.ones(2))
    twin = late.copy_of(program.module)

    assert _fx.get_tensor(program.module, "spare.table") is _fx.get_tensor(twin, "spare.table")
    assert [name for name, _ in program.module.named_parameters()] == [name for name, _ in twin.named_parameters()]


def test_torch_export_takes_a_module_whose_code_is_not_written_yet() -> None:
    program, x = trace(made(Residual), (random(2, 5),)), random(2, 5)
    exported = torch.export.export(program.clone().module, (x,))

    assert torch.equal(program(x)["output"], exported.module()(x)["output"])
