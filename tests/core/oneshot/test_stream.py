"""Many batches run side by side through a graph, stop by stop."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from core.oneshot.layers import Weighted
from models import VOCABULARY, Encoder, Residual, Tied, Transposed, made, random
from torch import Tensor, nn

from sparsec import Program, _fx, trace
from sparsec.oneshot.stops import bias_of, find_stops
from sparsec.oneshot.stream import Stream
from sparsec.passes.mask import Mask
from sparsec.pipeline import PassManager


def ids(batch: int, length: int) -> Tensor:
    return torch.arange(batch * length).view(batch, length) % VOCABULARY


def encoder() -> Program:
    return trace(made(Encoder), {"tokens": ids(2, 3)}, {"tokens": {0: "batch", 1: "length"}}, {"length": 16})


def outputs(stream: Stream, program: Program) -> list[list[Tensor]]:
    end = program.module.graph.output_node()
    stream.advance(end)
    return [list(arguments[0].values()) for arguments, _ in stream.at(end, end.all_input_nodes[0])]


# Running --------------------------------------------------------------------------------------------------------------


def test_batches_of_any_length_give_the_programs_own_outputs() -> None:
    program, batches = encoder(), [ids(2, 3), ids(3, 5), ids(2, 16)]
    stream = Stream(program.module, [[batch] for batch in batches])
    for node in list(program.module.graph.nodes)[::7]:
        stream.advance(node)
    found = outputs(stream, program)

    for batch, values in zip(batches, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(program(batch).values(), values, strict=True))


class Deep(nn.Module):
    """Ten layers, so that keeping everything would show."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x)) + x
        return x


def test_values_are_dropped_after_their_last_use() -> None:
    program = trace(made(Deep), (random(2, 4),))
    stream = Stream(program.module, [[random(2, 4)], [random(3, 4)]])
    most = 0
    for node in program.module.graph.nodes:
        stream.advance(node)
        most = max(most, *(len(values) for values in stream._values))

    assert most <= 2  # the residual stream and the branch


class Wide(nn.Module):
    """Three feed-forward layers with a wide middle."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 32) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(32, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def test_wide_values_are_not_kept_and_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.oneshot.stream._HELD_ALONE", 0)
    monkeypatch.setattr("sparsec.oneshot.stream._HELD_PAIRED", 0)
    program = trace(made(Wide), (random(2, 4),))
    batches = [random(2, 4), random(3, 4, seed=1)]
    stream, kept = Stream(program.module, [[batch] for batch in batches]), {}
    for node in program.module.graph.nodes:
        if "linear" in str(node.target):
            stream.advance(node)
            source = node.args[0]
            kept[node.name] = max(value.shape[-1] for values in stream._values for value in values.values())
            found = [x for _, x in stream.at(node, source)]  # type: ignore[arg-type]
            again = [x for _, x in stream.fork().at(node, source)]  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))

    assert {4} == set(kept.values())  # never the 32 of the middle
    for batch, values in zip(batches, outputs(stream, program), strict=True):
        assert torch.equal(program(batch)["output"], values[0])


def test_of_wide_values_some_batches_are_kept_and_all_catch_up_at_the_next_stop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsec.oneshot.stream._HELD_ALONE", 0)
    monkeypatch.setattr("sparsec.oneshot.stream._WIDER", 5.5)  # of the 4 before; 36 would be all
    program = trace(made(Wide), (random(2, 4),))
    batches = [random(2, 4, seed=seed) for seed in range(8)]
    stream, widths = Stream(program.module, [[batch] for batch in batches]), []
    for node in program.module.graph.nodes:
        if "linear" in str(node.target):
            stream.advance(node)
            widths.append([max(value.shape[-1] for value in values.values()) for values in stream._values])

    assert [4] * 8 == widths[0] == widths[2] == widths[4]
    assert [32] * 4 + [4] * 4 == widths[1] == widths[3] == widths[5]
    for batch, values in zip(batches, outputs(stream, program), strict=True):
        assert torch.equal(program(batch)["output"], values[0])


class Normed(nn.Module):
    """A normalisation before each of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


def test_what_a_normalisation_gives_is_not_kept_beside_what_it_takes() -> None:
    program = trace(made(Normed), (random(2, 4),))
    batches = [random(2, 4), random(3, 4, seed=1)]
    stream = Stream(program.module, [[batch] for batch in batches])
    for node in program.module.graph.nodes:
        if "linear" in str(node.target):
            stream.advance(node)
            assert [1, 1] == [len(values) for values in stream._values]
            first = [x for _, x in stream.at(node, node.args[0])]  # type: ignore[arg-type]
            assert all(torch.equal(a, b) for a, (_, b) in zip(first, stream.at(node, node.args[0]), strict=True))  # type: ignore[arg-type]

    for batch, values in zip(batches, outputs(stream, program), strict=True):
        assert torch.equal(program(batch)["output"], values[0])


def test_values_that_become_fewer_are_never_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide input before a less wide middle: to stay would take more memory, not less."""
    monkeypatch.setattr("sparsec.oneshot.stream._HELD_ALONE", 0)
    monkeypatch.setattr("sparsec.oneshot.stream._WIDER", 0.1)
    net = made(lambda: nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16), nn.Linear(16, 8)))
    program = trace(net, (random(2, 64),))
    stream = Stream(program.module, [[random(2, 64, seed=seed)] for seed in range(4)])
    widths = []
    for node in program.module.graph.nodes:
        if "linear" in str(node.target):
            stream.advance(node)
            widths.append({value.shape[-1] for values in stream._values for value in values.values()})

    assert [{64}, {32}, {16}] == widths


def test_a_weight_changed_behind_values_that_are_not_kept_is_what_later_nodes_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sparsec.oneshot.stream._HELD_ALONE", 0)
    program = trace(made(Wide), (random(2, 4),))
    stream = Stream(program.module, [[random(2, 4)]])
    for name in ("down.0.weight", "down.1.weight"):
        site = program.sites[name]
        stream.advance(_fx.find(program.module, *site.users))
        site.write(program.module, torch.full(site.shape, 0.5))

    ((found,),) = outputs(stream, program)
    assert torch.equal(program(random(2, 4))["output"], found)


def test_a_dropped_value_is_freed() -> None:
    program = trace(made(Deep), (random(2, 4),))
    stream = Stream(program.module, [[random(2, 4)]])
    linears = [node for node in program.module.graph.nodes if "linear" in str(node.target)]
    stream.advance(linears[1])
    ((arguments, value),) = stream.at(linears[1], linears[1].args[0])  # type: ignore[arg-type]
    seen = weakref.ref(value)
    del arguments, value
    assert seen() is not None
    stream.advance(linears[3])
    gc.collect()

    assert seen() is None


@pytest.mark.parametrize("masked", [False, True])
def test_a_weight_changed_at_a_stop_is_what_later_nodes_read(masked: bool) -> None:
    program = trace(made(lambda: Weighted((5, 6), lambda x, w: torch.relu(x) @ w.T.t())), (random(2, 5),))
    if masked:
        targets = program.sites.with_targets({"*": "2:4"} if program.sites.sites[0].eligible else {"weight": "2:4"})
        program = PassManager((Mask(),)).run(program.replace(sites=targets))
    (site,) = program.sites
    stream = Stream(program.module, [[random(2, 5)]])
    stream.advance(_fx.find(program.module, *site.users))
    site.write(program.module, torch.full(site.shape, 2.0))
    ((found,),) = outputs(stream, program)

    assert torch.equal(program(random(2, 5))["output"], found)
    assert found.any()


def test_a_fork_keeps_the_dense_weights() -> None:
    program = trace(made(Residual), (random(2, 5),))
    dense, x = program.clone(), random(3, 5)
    expected = program(x)["output"]
    stream = Stream(program.module, [[x]])
    first = _fx.find(program.module, *program.sites["up.weight"].users)
    stream.advance(first)
    original = stream.fork().on(dense.module)
    program.sites["up.weight"].write(program.module, torch.zeros(1, 8, 5))
    changed = outputs(stream, program)[0][0]

    assert torch.equal(expected, outputs(original, program)[0][0])
    assert torch.equal(program(x)["output"], changed)
    assert not torch.equal(expected, changed)


# Stops ----------------------------------------------------------------------------------------------------------------


def names(program: Program) -> list[list[str]]:
    return [[site.name for site in stop.sites] for stop in find_stops(program.module, list(program.sites))]


def test_query_key_and_value_share_a_stop_and_stops_come_in_graph_order() -> None:
    expected = [["query", "key", "value"], ["out"], ["up"], ["down"], ["pooler"]]

    assert [[f"{name}.weight" for name in group] for group in expected] == names(encoder())


def test_a_stop_is_before_the_first_of_its_layers() -> None:
    program = encoder()
    stops = find_stops(program.module, list(program.sites)[::-1])

    assert program.sites["query.weight"].users == (stops[0].node.name,)
    assert not any(stop.shared for stop in stops)


def test_a_tied_weight_and_a_layer_called_twice_have_a_stop_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)) + self.other(x))

    program = trace(made(Twice), (random(2, 4),))
    stops = {stop.sites[0].name: stop for stop in find_stops(program.module, list(program.sites))}
    (tied,) = find_stops(*(lambda p: (p.module, list(p.sites)))(trace(made(Tied), (random(2, 6),))))

    assert [["layer.weight"], ["other.weight"]] == names(program)
    assert (True, False, True) == (stops["layer.weight"].shared, stops["other.weight"].shared, tied.shared)
    assert [2, 2] == [len(stop.uses[stop.sites[0].name]) for stop in (stops["layer.weight"], tied)]


# Biases ---------------------------------------------------------------------------------------------------------------


def biases(net: nn.Module, *shape: int) -> list[str | None]:
    program = trace(net, (random(*shape),), dynamic={})
    return [bias_of(program.module, site) for site in program.sites]


class Shared(nn.Module):
    """Two layers that add the same bias, and one that adds a part of it."""

    def __init__(self, sliced: bool) -> None:
        super().__init__()
        self.one, self.two, self.sliced = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), sliced
        self.bias = nn.Parameter(torch.randn(8 if sliced else 4))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias[:4] if self.sliced else self.bias
        other = self.bias[4:] if self.sliced else self.bias
        return nn.functional.linear(nn.functional.linear(x, self.one.weight, bias), self.two.weight, other)


def test_the_bias_of_a_layer_is_found_where_nothing_else_reads_it() -> None:
    assert ["up.bias", "down.bias"] == biases(made(Residual), 2, 5)
    assert ["bias"] == biases(made(Transposed), 3, 4)
    assert ["bias"] == biases(made(lambda: nn.Conv1d(4, 6, 3, groups=2)), 2, 4, 9)
    assert ["bias"] == biases(made(lambda: nn.Conv2d(3, 4, 2)), 2, 3, 5, 5)


def test_a_bias_that_is_missing_shared_cut_or_tied_is_none() -> None:
    assert [None] == biases(made(lambda: nn.Linear(4, 4, bias=False)), 2, 4)
    assert [None, None] == biases(made(lambda: Shared(sliced=False)), 2, 4)
    assert [None, None] == biases(made(lambda: Shared(sliced=True)), 2, 4)
    assert [None] == biases(made(Tied), 2, 6)
    assert [None] == biases(made(lambda: Weighted((4, 6), lambda x, w: torch.mm(x, w))), 2, 4)


def test_a_parameter_that_a_product_multiplies_is_no_bias() -> None:
    class Queries(nn.Module):
        """mm(parameter, weight): the first argument of addmm is the bias, of mm it is not."""

        def __init__(self) -> None:
            super().__init__()
            self.queries, self.weight = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(self.queries, self.weight) + x

    program = trace(made(Queries), (random(2, 6),), dynamic={})

    assert [None] * len(program.sites) == [bias_of(program.module, site) for site in program.sites]
