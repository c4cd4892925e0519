"""The graph survives JSON unchanged, and a hostile JSON is a GraphError before anything runs."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, Encoder, Gated, Residual, made, random
from torch import Tensor, nn
from torch.nn import functional

from sparsec import graph, store, trace
from sparsec.errors import ArtifactError, GraphError, SparsecError
from sparsec.program import Program, read_graph, write_graph

Data = dict[str, Any]
TENSORS = {"w": random(4, 4)}


def linear() -> Data:
    """y = linear(x, w), as a file would say it."""
    return {
        "inputs": [{"name": "x", "input": "x", "type": "float32[2, 4]"}],
        "tensors": {"w": "parameter"},
        "nodes": [
            {"name": "w", "tensor": "w", "type": "float32[4, 4]"},
            {"name": "y", "op": "aten.linear.default", "args": [{"node": "x"}, {"node": "w"}], "type": "float32[2, 4]"},
        ],
        "outputs": {"output": "y"},
    }


# Round trip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", [Residual, Classifier, Encoder, Gated])
def test_a_graph_reads_back_with_the_same_dump_and_outputs(net: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randint(0, 10, (2, 3)) if net is Encoder else random(2, 4 if net is Gated else 5)
    program = trace(made(net), (x,))
    write_graph(tmp_path, program.module)
    again = read_graph(tmp_path)

    assert graph.dump(program.module) == graph.dump(again)
    assert graph.to_json(program.module) == graph.to_json(again)
    for name, value in program(x).items():
        assert torch.equal(value, again(x)[name])


class Arguments(nn.Module):
    """Every kind of argument that JSON has no word for."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        blocked = torch.full((4,), -math.inf, dtype=x.dtype, device=x.device)
        picked = x.masked_fill(x > 1e9, math.nan).clamp(max=math.inf)[:, 1:3]
        return {
            "blocked": x + blocked,
            "picked": picked[:, :, None, None].contiguous(memory_format=torch.channels_last),
            "half": x.to(torch.float64).to(torch.float16),
            "grid": torch.arange(x.shape[0], device=x.device, dtype=torch.int64)[:, None] * 2,
        }


def test_every_kind_of_argument_survives() -> None:
    x = random(3, 4)
    module = trace(Arguments(), (x,)).module
    text = json.dumps(graph.to_json(module), allow_nan=False)
    again = graph.from_json(json.loads(text), {})

    for kind in (
        '{"float": "-inf"}',
        '{"float": "nan"}',
        '"dtype": "float64"',
        '"dtype": "float16"',
        '"memory_format"',
    ):
        assert kind in text, kind
    assert graph.dump(module) == graph.dump(again)
    for name, value in module(x).items():
        assert torch.equal(value, again(x)[name]), name


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1.5, math.inf, -math.inf, "text 'with' \"quotes\"\n", [1, [2, None]], (1, (2,)), slice(1, None, 2),
     torch.float32, torch.bfloat16, torch.strided, torch.channels_last],
    ids=repr,
)  # fmt: skip
def test_an_argument_reads_back_as_itself(value: Any) -> None:
    text = json.dumps(graph._encode(value), allow_nan=False)
    found = graph._decode(json.loads(text), {})

    assert value == found
    assert type(value) is type(found)


def test_nan_reads_back_as_nan() -> None:
    assert math.isnan(graph._decode(graph._encode(math.nan), {}))


def test_a_device_is_written_as_the_inputs() -> None:
    assert {"device": "input"} == graph._encode(torch.device("cuda:3"))


def test_an_object_that_is_no_data_cannot_be_written() -> None:
    with pytest.raises(GraphError, match="type Tensor cannot be stored"):
        graph._encode(torch.zeros(2))


def test_an_operator_off_the_list_cannot_be_written() -> None:
    program = trace(made(Residual), (random(2, 5),)).clone()
    next(
        node for node in program.module.graph.nodes if "gelu" in str(node.target)
    ).target = torch.ops.aten.relu_.default

    with pytest.raises(GraphError, match=r"aten\.relu_\.default is not on"):
        graph.to_json(program.module)


def test_outputs_that_read_a_parameter_itself_survive() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"scale": self.scale, "x": x}

    module = trace(Bare(), (random(2, 2),)).module
    again = graph.from_json(graph.to_json(module), {"scale": module.scale})

    assert graph.dump(module) == graph.dump(again)


# Hostile --------------------------------------------------------------------------------------------------------------


def put(*path: str | int, value: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        for key in path[:-1]:
            data = data[key]  # type: ignore[index]
        data[path[-1]] = value  # type: ignore[index]

    return change


def rename_node(name: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["nodes"][1]["name"] = data["outputs"]["output"] = name

    return change


def rename_tensor(name: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["tensors"] = {name: "parameter"}
        data["nodes"][0]["tensor"] = name

    return change


def rename_input(name: Any) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data["inputs"][0] |= {"name": name, "input": name}
        data["nodes"][1]["args"][0]["node"] = name

    return change


def deep() -> list[Any]:
    nested: list[Any] = []
    for _ in range(50_000):
        nested = [nested]
    return nested


EVIL = "x = __import__('os').system('true')"
HOSTILE: dict[str, Callable[[Data], None]] = {
    **{f"operator {op!r}": put("nodes", 1, "op", value=op) for op in [
        "aten.from_file.default", "aten.from_file", "aten.linear", "aten.relu_.default", "aten.empty.memory_format",
        "profiler._record_function_enter.default", "prims.add.default", "sparsec.evil.default", "py.eval", "os.system",
        "aten.__class__.default", "aten.linear.__init__", "aten.linear.default.__call__", "py.__import__", "aten", "",
        "py.attrgetter", "builtins.eval", EVIL, None, 3, [], {}, ".",
    ]},
    **{f"argument {value!r:.40}": put("nodes", 1, "args", 1, value=value) for value in [
        {"node": "z"}, {"node": "y"}, {"node": None}, {"node": []}, {"node": "x", "tuple": []}, {"tuple": 3}, {},
        {"device": "cuda"}, {"device": "cpu"}, {"device": None}, {"layout": "float32"}, {"memory_format": EVIL},
        {"dtype": "os"}, {"dtype": "__builtins__"}, {"dtype": "strided"}, {"dtype": "load"}, {"dtype": 3},
        {"float": EVIL}, {"float": None}, {"slice": [1, 2, 3, 4]}, {"slice": 3}, {"code": EVIL},
    ]},
    **{f"node name {name!r:.30}": rename_node(name) for name in [
        "a b", "a\nb", "a;b", "a'b", 'a"b', "a.b", "1a", "", "é", "import os", EVIL, "lambda", "class", "None", "torch",
        "getattr", "__import__", "device", "self", "x", "w", None, 3, [],
    ]},
    **{f"input name {name!r:.30}": rename_input(name) for name in [
        "a b", "a\nb", "x, y=print(1)", "*args", "x: print(1)", "lambda", "self", "torch", EVIL, None, 3,
    ]},
    **{f"input {name!r:.30}": put("inputs", 0, "input", value=name) for name in [
        "y", "x y", "*x", "self", EVIL, None, 3,
    ]},
    **{f"tensor name {name!r:.30}": rename_tensor(name) for name in [
        "../w", "w/..", "..", "w..w", ".w", "w.", "w'", 'w"', "w\n", "w w", "", "/etc/passwd", "other", "__class__",
        "__init__.__globals__", "graph", "meta", "_graph", "recompile", "print_readable", "code", "training", "forward",
        "_parameters.w",
    ]},
    "output of no node": put("outputs", "output", value="z"),
    "tensor that is not listed": put("nodes", 0, "tensor", value="v"),
    "tensor as an object": put("nodes", 0, "tensor", value={}),
    "two nodes of one name": put("nodes", 1, "name", value="w"),
    "two inputs of one name": lambda data: data["inputs"].append(data["inputs"][0]),
    "forward reference": lambda data: data["nodes"].reverse(),
    "keyword that is Python": put("nodes", 1, "kwargs", value={"class": None}),
    "keyword that is code": put("nodes", 1, "kwargs", value={"bias=print(1), x": None}),
    "keywords as a list": put("nodes", 1, "kwargs", value=[1]),
    "arguments nested deep": put("nodes", 1, "args", value=deep()),
    "arguments missing": lambda data: data["nodes"][1].pop("args"),
    "arguments a number": put("nodes", 1, "args", value=3),
    "type missing": lambda data: data["nodes"][1].pop("type"),
    "meta of text": put("nodes", 1, "meta", value={"dropout_p": EVIL}),
    "meta a list": put("nodes", 1, "meta", value=[1]),
    "node a list": put("nodes", 1, value=[1]),
    **{f"no {key}": lambda data, key=key: data.pop(key) for key in linear()},
    **{f"{key} is {value!r}": put(key, value=value) for key in linear() for value in (None, 3, "x", [3])},
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_graph_is_refused(change: Callable[[Data], None], monkeypatch: pytest.MonkeyPatch) -> None:
    data = copy.deepcopy(linear())
    change(data)
    monkeypatch.setattr("os.system", lambda command: pytest.fail("code of the file was run"))
    tensors = TENSORS | ({name: TENSORS["w"] for name in data["tensors"] if name != "other"}
                         if isinstance(data.get("tensors"), dict) else {})  # fmt: skip

    with pytest.raises((GraphError, ArtifactError)) as caught:
        graph.from_json(data, tensors)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("data", [None, 3, "x", [], [1], {}])
def test_what_is_no_graph_is_refused(data: Any) -> None:
    with pytest.raises(GraphError):
        graph.from_json(data, TENSORS)


def test_the_unharmed_graph_of_these_tests_is_accepted() -> None:
    module = graph.from_json(linear(), TENSORS)

    assert torch.equal(torch.nn.functional.linear(random(2, 4), TENSORS["w"]), module(random(2, 4))["output"])


def test_text_in_arguments_stays_text() -> None:
    data = linear()
    data["nodes"][1]["args"] = [{"node": "x"}, {"node": "w"}, "'); raise SystemExit('"]

    with pytest.raises(RuntimeError, match="linear"):  # torch refuses the type; the text was never code
        graph.from_json(data, TENSORS)(random(2, 4))


@pytest.mark.parametrize("key", ["a\nb", "'", '"', "\\", "': 0}; raise SystemExit #", "{x}", "%s"])
def test_text_in_output_names_stays_text(key: str) -> None:
    data = linear()
    data["outputs"] = {key: "y"}

    assert [key] == list(graph.from_json(data, TENSORS)(random(2, 4)))


def test_names_that_models_have_are_accepted() -> None:
    for name in ["0.weight", "encoder.layer.11.attention.self.query.weight", "lambda_1", "_w", "LayerNorm.weight"]:
        data = linear()
        rename_tensor(name)(data)
        graph.from_json(data, {name: TENSORS["w"]})


@pytest.mark.parametrize("name", ["inputIds", "X", "input", "max"])
def test_an_input_may_have_any_python_name(name: str, tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(f"def forward(self, {name}): return self.up({name})", scope)
    program = trace(type("Named", (Residual,), {"forward": scope["forward"]})(), (random(2, 5),))
    again = Program.load(program.save(tmp_path / "saved"))

    assert torch.equal(program(**{name: random(2, 5)})["output"], again(**{name: random(2, 5)})["output"])


@pytest.mark.parametrize("key", ["my out", "logits.0", "a'b", 0, "class"])
def test_an_output_key_that_is_traced_can_be_loaded_or_is_refused(key: Any, tmp_path: Path) -> None:
    class Keyed(Residual):
        def forward(self, x: Tensor) -> dict[Any, Tensor]:
            return {key: self.up(x)}

    refused = ""
    try:
        program = trace(Keyed(), (random(2, 5),))
    except SparsecError as error:
        refused = str(error)
    if refused:
        assert str(key) in refused
        return
    assert list(program(random(2, 5))) == list(Program.load(program.save(tmp_path / "saved"))(random(2, 5)))


@pytest.mark.parametrize("name", ["up.weight", "down.bias"])
def test_a_tensor_that_is_missing_is_named(name: str, tmp_path: Path) -> None:
    folder = trace(made(Residual), (random(2, 5),)).save(tmp_path / "saved")
    tensors = store.load_tensors(folder / "weights.safetensors")
    del tensors[name]
    store.save_tensors(folder / "weights.safetensors", tensors)

    with pytest.raises(ArtifactError, match=r"weights\.safetensors has \d+ bytes, which is not"):
        Program.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    store.seal(folder, "sparsec-program", {key: value for key, value in manifest.items() if key != "files"})
    with pytest.raises(ArtifactError, match=f"has no tensor '{name}', which graph.json reads: the folder is incompl"):
        Program.load(folder)


# Text -----------------------------------------------------------------------------------------------------------------


class Tensors(nn.Module):
    """Tensors of every kind that a dump must hash: odd types, views, empty, one number, a parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(4, 6).T)
        self.short = nn.Parameter(random(4).bfloat16())
        self.register_buffer("mask", random(4) > 0)
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("scale", torch.tensor(-0.0))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.linear(x, self.weight)[:, :4] * self.short.float() * self.scale
        return torch.cat([x.where(self.mask, 0.0), self.none])


def test_a_dump_with_hashes_is_the_same_after_saving_again_and_again(tmp_path: Path) -> None:
    program = trace(made(Tensors), (random(2, 4),))
    once = Program.load(program.save(tmp_path / "once"))
    twice = Program.load(once.save(tmp_path / "twice"))

    assert 5 == program.dump(hashes=True).count(" #")
    assert program.dump(hashes=True) == once.dump(hashes=True) == twice.dump(hashes=True)
    assert program.dump(hashes=True) == program.dump(hashes=True)
    assert program.dump() == once.dump()


def test_a_hash_is_of_the_values_bit_for_bit() -> None:
    x = random(3, 4)

    assert graph.content_hash(x) == graph.content_hash(x.T.contiguous().T) == graph.content_hash(nn.Parameter(x))
    assert graph.content_hash(x) != graph.content_hash(x.T)
    assert graph.content_hash(torch.zeros(2)) != graph.content_hash(-torch.zeros(2))
    assert hashlib.sha256(struct.pack("<f", 1.5)).hexdigest()[:8] == graph.content_hash(torch.tensor(1.5))


def test_only_the_hash_of_a_changed_weight_changes() -> None:
    program = trace(made(Residual), (random(2, 5),)).clone()
    before = program.dump(hashes=True).splitlines()
    site = program.sites["up.weight"]
    site.write(program.module, site.read(program.module) + torch.eye(8, 5) * 1e-7)
    after = program.dump(hashes=True).splitlines()

    assert ["@up.weight"] == [line.split()[3] for line, other in zip(before, after, strict=True) if line != other]


def test_a_dump_does_not_tell_where_it_was_made() -> None:
    assert ["input.device", "1::", ":2:3"] == [
        graph._text(value) for value in (torch.device("cuda:1"), slice(1, None), slice(None, 2, 3))
    ]


def test_a_dump_has_a_line_for_each_node_and_no_values() -> None:
    module = trace(made(Classifier), (random(2, 5),)).module
    lines = graph.dump(module).splitlines()

    assert len(list(module.graph.nodes)) == len(lines)
    assert all(line.endswith("]") or " return {" in line for line in lines)
    assert "0x" not in graph.dump(module)
