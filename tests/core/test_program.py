"""A program is copied, written, saved and checked without touching what others hold."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, Residual, Tied, made, random
from torch import nn

from sparsec import PassManager, Program, _fx, store, trace
from sparsec.errors import ArtifactError, GraphError, SparsecError, UsageError
from sparsec.sites import SiteTable
from sparsec.view import WeightView


def traced(net: type[nn.Module] = Residual, width: int = 5) -> Program:
    return trace(made(net), (random(2, width),))


def run(program: Program, text: str) -> Program:
    return PassManager.parse(text).run(program)


# Calls ----------------------------------------------------------------------------------------------------------------


def test_inputs_go_by_position_or_by_name() -> None:
    program, x = traced(), random(7, 5, seed=1)

    assert torch.equal(program(x)["output"], program(x=x)["output"])
    assert (7, 5) == tuple(program(x)["output"].shape)


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((), {"y": 0}), ((0, 0), {}), ((0,), {"x": 0}), ((0,), {"y": 0})]
)  # fmt: skip
def test_wrong_inputs_are_named(args: tuple[int, ...], kwargs: dict[str, int]) -> None:
    x = random(2, 5)

    with pytest.raises(UsageError, match=f"expected the inputs x, found {len(args)} by position"):
        traced()(*[x for _ in args], **dict.fromkeys(kwargs, x))


# Copies ---------------------------------------------------------------------------------------------------------------


def test_a_clone_shares_tensors_and_nothing_else() -> None:
    program = traced()
    clone = program.clone()

    assert program.module is not clone.module
    assert {n: p.data_ptr() for n, p in program.module.named_parameters()} == {
        n: p.data_ptr() for n, p in clone.module.named_parameters()
    }
    assert all(
        dict(program.module.named_parameters())[name] is parameter
        for name, parameter in clone.module.named_parameters()
    )


def test_an_edit_of_a_clone_does_not_leak() -> None:
    program = traced()
    before = program.dump()
    clone = program.clone()
    site = clone.sites["up.weight"]
    site.write(clone.module, torch.zeros(1, 8, 5))
    for node in _fx.calls(clone.module.graph, torch.ops.aten.gelu.default):
        _fx.replace(node, node.args[0])
    clone.module.recompile()

    assert before == program.dump()
    assert before != clone.dump()
    assert program.sites["up.weight"].read(program.module).abs().sum() > 0


def test_writing_a_site_leaves_the_model_alone() -> None:
    net = made(Residual)
    weight = net.up.weight.detach().clone()
    program = trace(net, (random(2, 5),)).clone()
    program.sites["up.weight"].write(program.module, torch.zeros(1, 8, 5))

    assert torch.equal(weight, net.up.weight)
    assert 0 == program.sites["up.weight"].read(program.module).abs().sum()


def test_a_written_weight_keeps_type_and_trainability() -> None:
    program = traced().clone()
    _fx.get_tensor(program.module, "up.weight").requires_grad_(False)
    program.sites["up.weight"].write(program.module, torch.zeros(1, 8, 5, dtype=torch.float64))

    assert torch.float32 == _fx.get_tensor(program.module, "up.weight").dtype
    assert not _fx.get_tensor(program.module, "up.weight").requires_grad


def test_a_weight_of_another_size_is_not_written() -> None:
    program = traced().clone()

    with pytest.raises(GraphError, match=r"up\.weight: expected a weight of shape \(1, 8, 5\), found \(1, 8, 4\)"):
        program.sites["up.weight"].write(program.module, torch.zeros(1, 8, 4))


def test_training_the_graph_trains_the_model() -> None:
    net = made(Residual)
    program = trace(net, (random(2, 5),))
    program(random(2, 5))["output"].sum().backward()

    assert net.up.weight.grad is not None
    assert dict(program.module.named_parameters())["up.weight"] is net.up.weight


# Writing back ---------------------------------------------------------------------------------------------------------


def test_write_back_gives_the_model_the_programs_outputs() -> None:
    net, x = made(Residual), random(2, 5)
    program = run(trace(net, (x,)), "mask{pattern=2:4} | freeze")
    program.write_back(net)

    assert torch.equal(program(x)["output"], net(x))
    assert int((net.up.weight == 0).sum()) == 8 * 2  # 2 of the first 4, and the tail of 1 is kept


def test_write_back_reaches_both_names_of_a_tied_weight() -> None:
    net, x = made(Tied), random(2, 6)
    program = run(trace(net, (x,)), "mask{pattern=1:2} | freeze")
    program.write_back(net)

    assert net.first.weight is net.second.weight
    assert torch.equal(program(x)["output"], net(x))


def test_write_back_is_refused_while_masks_are_in_the_graph() -> None:
    net = made(Residual)
    program = run(trace(net, (random(2, 5),)), "mask{pattern=2:4}")

    with pytest.raises(UsageError, match="freeze"):
        program.write_back(net)


def test_write_back_is_refused_when_the_weights_are_packed() -> None:
    net = made(Residual)
    program = run(trace(net, (random(2, 5),)), "mask{pattern=2:4} | freeze | lower")

    with pytest.raises(UsageError, match="write_back"):
        program.write_back(net)


def test_write_back_to_another_model_changes_nothing() -> None:
    other = made(Classifier)
    before = other.body.weight.detach().clone()

    with pytest.raises(UsageError, match="has no parameter"):
        traced().write_back(other)
    assert torch.equal(before, other.body.weight)


# Folders --------------------------------------------------------------------------------------------------------------

STATES = [
    "",
    "mask{pattern=2:4}",
    "mask{pattern=3:2:5, columns=l1}",
    "mask{pattern=unstructured:0.5} | freeze",
    "mask{pattern=2:4} | freeze | lower",
]


@pytest.mark.parametrize("passes", STATES)
@pytest.mark.parametrize("net", [Residual, Tied])
def test_a_saved_program_is_loaded_as_it_was(net: type[nn.Module], passes: str, tmp_path: Path) -> None:
    x = random(2, 5 if net is Residual else 6)
    program = trace(made(net), (x,), origin={"model": "a test"})
    program = run(program, passes) if passes else program
    again = Program.load(program.save(tmp_path / "saved"))

    assert program.dump() == again.dump()
    assert (program.facts, program.history, program.dims, program.origin) == (
        again.facts, again.history, again.dims, again.origin
    )  # fmt: skip
    assert torch.equal(program(x)["output"], again(x)["output"])
    assert torch.equal(program.inputs["x"], again.inputs["x"])
    assert program.sites.exclusions == again.sites.exclusions
    for site, found in zip(program.sites, again.sites, strict=True):
        assert site.replace(selection=None) == found.replace(selection=None)
        tables = site.selection.tensors() if site.selection else {}
        stored = found.selection.tensors() if found.selection else {}
        assert tables.keys() == stored.keys()
        assert all(torch.equal(tables[name], stored[name]) for name in tables)


def test_what_is_not_trained_is_not_after_loading_either(tmp_path: Path) -> None:
    program = traced().clone()
    _fx.get_tensor(program.module, "up.weight").requires_grad_(False)
    loaded = Program.load(program.save(tmp_path / "program"))

    before, after = (dict(one.module.named_parameters()) for one in (program, loaded))
    assert {name: one.requires_grad for name, one in before.items()} == {
        n: one.requires_grad for n, one in after.items()
    }
    assert {True, False} == {one.requires_grad for one in after.values()}


def test_a_loaded_program_can_be_worked_on(tmp_path: Path) -> None:
    masked = run(traced(), "mask{pattern=2:4}")
    again = Program.load(masked.save(tmp_path / "saved"))

    assert run(masked, "freeze | lower").dump() == run(again, "freeze | lower").dump()


def test_saving_twice_needs_force(tmp_path: Path) -> None:
    program = traced()
    program.save(tmp_path / "saved")

    with pytest.raises(UsageError, match="--force"):
        program.save(tmp_path / "saved")
    program.save(tmp_path / "saved", force=True)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    program = run(traced(), "mask{pattern=2:4}")
    first, second = program.save(tmp_path / "a"), program.save(tmp_path / "b")

    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (second / file.name).read_bytes(), file.name


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_configuration_with_numbers_json_lacks_is_saved_or_refused_in_words(value: float, tmp_path: Path) -> None:
    program = traced().replace(origin={"config": {"limit": value}})

    refused = ""
    try:
        program.save(tmp_path / "saved")
    except SparsecError as error:
        refused = str(error)
    if refused:
        assert "config" in refused or "JSON" in refused
        assert [] == list(tmp_path.iterdir())


def damaged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A folder whose state was changed, with matching hashes."""
    manifest = json.loads((folder / store.MANIFEST).read_text())
    change(manifest)
    text = json.dumps(manifest)
    (folder / store.MANIFEST).write_text(text)
    (folder / store.MANIFEST_HASH).write_text(hashlib.sha256(text.encode()).hexdigest())
    return folder


def state(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["program"].update({key: value})


def site(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda manifest: manifest["program"]["sites"][0].update({key: value})


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no program": lambda m: m.pop("program"),
    "no sites": lambda m: m["program"].pop("sites"),
    "sites of text": state("sites", ["x"]),
    "sites of numbers": state("sites", [1]),
    "sites a number": state("sites", 1),
    "dims a list": state("dims", [1]),
    "dims incomplete": state("dims", {"batch": [1]}),
    "facts a number": state("facts", 1),
    "facts unknown": state("facts", ["traced", "fast"]),
    "an input that has no example": state("inputs", ["y"]),
    "exclusions of text": state("exclusions", ["x"]),
    "a site without name": lambda m: m["program"]["sites"][0].pop("name"),
    "a site with an unknown key": site("speed", 3),
    "a site of another name": site("name", "nowhere.weight"),
    "a site of another shape": site("view", {"axes": [0, 1], "parameter": [5, 8]}),
    "a site of another size": site("view", {"axes": [0, 1], "parameter": [3, 3]}),
    "a site with a bad pattern": site("pattern", "3:2"),
    "a site with an unknown user": site("users", ["nobody"]),
    "a site with an unknown mask": site("mask", "nowhere"),
    "a site without its tables": site("selected", True),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_folder_with_a_broken_state_is_refused(change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    folder = damaged(traced().save(tmp_path / "saved"), change)

    with pytest.raises(SparsecError):
        Program.load(folder)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a sparsec folder"):
        Program.load(tmp_path)


# Checks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"users": ("nobody",)}, "its user nobody is not in the graph"),
        ({"mask": "up.weight_mask"}, r"its mask up\.weight_mask is not in the graph"),
        ({"name": "nowhere.weight"}, r"nowhere\.weight"),
        ({"view": WeightView((0, 1), (5, 8))}, r"up\.weight"),
        ({"view": WeightView((0, 1), (3, 3))}, r"up\.weight"),
    ],
)
def test_a_site_that_does_not_fit_the_graph_is_named(changes: dict[str, Any], message: str) -> None:
    program = traced()
    first = program.sites["up.weight"]

    with pytest.raises(GraphError, match=message):
        program.replace(sites=SiteTable((first.replace(**changes),))).verify()


def test_a_node_without_type_is_named() -> None:
    program = traced().clone()
    del next(iter(program.module.graph.nodes)).meta[_fx.TYPE]

    with pytest.raises(GraphError, match="node x has no type"):
        program.verify()


def test_a_tensor_that_is_gone_is_named() -> None:
    program = traced().clone()
    _fx.delete_tensor(program.module, "up.bias")

    with pytest.raises(GraphError, match=r"up\.bias"):
        program.verify()


def test_an_unknown_fact_is_named() -> None:
    with pytest.raises(GraphError, match="unknown facts: fast"):
        traced().replace(facts=frozenset({"traced", "fast"})).verify()


def test_a_call_of_a_module_is_refused() -> None:
    program = traced().clone()
    graph = program.module.graph
    program.module.add_module("extra", nn.Identity())
    node = next(iter(graph.nodes))
    with graph.inserting_after(node):
        inserted = graph.call_module("extra", (node,))
    inserted.meta[_fx.TYPE] = "float32[2, 5]"

    with pytest.raises(GraphError, match="call_module"):
        program.verify()
