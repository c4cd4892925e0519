"""The search for patterns that meet a speedup."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from fake_backend import Formula
from models import made
from torch import Tensor, nn

from sparsec import Pattern, Program, Recipe, trace
from sparsec.backend import Backend
from sparsec.errors import SparsecError, UsageError
from sparsec.search import Request, choose

CANDIDATES = ("2:4", "1:4", "16:2:8", "64:2:8")


class Stack(nn.Module):
    """Wide enough that its layers take some of the time; the middle one has one weight in eight that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(4))
        with torch.no_grad():
            self.layers[1].weight[:, torch.arange(128) % 8 > 1] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(made(Stack), {"x": torch.ones(64, 128)}, {"x": {0: "batch"}})


class PlansOnly(Formula):
    """Without a cost, as every backend but kernel."""

    name = "onnx"
    cost = Backend.cost


def asked(amount: float, budget: str = "speedup", **options: Any) -> Request:
    return Request(**{"budget": budget, "amount": amount, "tokens": 64, "candidates": CANDIDATES, **options})


def test_the_choice_is_fast_enough_and_a_recipe(program: Program) -> None:
    found = choose(program, Formula(), asked(1.1))
    recipe = Recipe.from_data({"model": "m", "targets": found.targets})

    assert found.speed >= 1.1
    assert 0 < found.quality <= 1
    assigned = {site.name: site.pattern for site in program.sites.with_targets(recipe.targets)}
    assert {name: text and Pattern.parse(text) for name, text in found.patterns.items()} == assigned


def test_one_site_at_a_time_keeps_at_least_as_much_as_one_pattern_for_all(program: Program) -> None:
    same = choose(program, Formula(), asked(1.1, uniform=True))
    free = choose(program, Formula(), asked(1.1))

    assert 1 == len(set(same.patterns.values()))
    assert free.quality >= same.quality * 0.97  # the two profiles differ by what the machine did meanwhile


def test_a_latency_is_met(program: Program) -> None:
    dense = choose(program, Formula(), asked(1.05)).dense_seconds
    found = choose(program, Formula(), asked(1e3 * dense / 1.2, "latency"))

    assert 1e3 * found.seconds <= 1e3 * dense / 1.2
    assert found.speed > 1


def test_a_density_counts_sites_that_stay_as_they_are(program: Program) -> None:
    targets = {"layers.0.weight": "1:4", "layers.3.weight": "ignore"}
    given = program.replace(sites=program.sites.with_targets(targets))
    found = choose(given, None, asked(0.6, "density"))

    kept = {name: Pattern.parse(text).density if text else 1.0 for name, text in found.patterns.items()}
    assert {"layers.1.weight", "layers.2.weight"} == kept.keys()
    assert found.density == pytest.approx((0.25 + 1.0 + sum(kept.values())) / 4)
    assert found.density <= 0.6
    assert {"layers.3.weight": "ignored by 'layers.3.weight'"} == found.left
    assert 0 == found.speed


def test_a_pattern_that_was_set_brings_its_own_speed(program: Program) -> None:
    given = program.replace(sites=program.sites.with_targets({"layers.0.weight": "1:4"}))
    with_one, without = (choose(one, Formula(), asked(1.05)) for one in (given, program))

    assert "layers.0.weight" not in with_one.patterns
    assert with_one.speed >= 1.05
    assert with_one.quality >= without.quality * 0.97


def test_a_speedup_out_of_reach_says_the_most_and_why(program: Program) -> None:
    with pytest.raises(SparsecError, match=r"1000x cannot be reached: the most is .*outside the sites") as error:
        choose(program, Formula(), asked(1000))
    assert 1 == error.value.exit_code


def test_a_latency_out_of_reach_says_the_least(program: Program) -> None:
    with pytest.raises(SparsecError, match=r"latency 1e-05 ms cannot be reached: the least is .* ms at 64 tokens"):
        choose(program, Formula(), asked(1e-5, "latency"))


def test_a_latency_that_dense_meets_asks_for_nothing(program: Program) -> None:
    with pytest.raises(UsageError, match="asks for nothing: the dense model takes"):
        choose(program, Formula(), asked(1e9, "latency"))


@pytest.mark.parametrize("speedup", [1.0, 0.0, -2.0, math.nan, math.inf])
def test_a_speedup_that_asks_for_nothing_is_refused(speedup: float) -> None:
    with pytest.raises(UsageError, match="expected a number above 1"):
        asked(speedup)


def test_an_objective_without_its_data_is_refused(program: Program) -> None:
    with pytest.raises(UsageError, match="looks at calibration data, and there is none; give --calib"):
        choose(program, None, asked(0.5, "density", objective="reconstruction"))


def test_sites_without_kernel_stay_dense_with_the_reason(program: Program) -> None:
    name = program.sites.sites[0].name
    found = choose(program, Formula(without=(name,)), asked(1.05))

    assert name not in found.patterns
    assert {name: "no kernel"} == found.left
    assert "ignore" == found.targets[name]


def test_no_kernel_at_all_is_an_error(program: Program) -> None:
    names = tuple(site.name for site in program.sites)
    with pytest.raises(SparsecError, match="no candidate has a sparse kernel here: no kernel"):
        choose(program, Formula(without=names), asked(1.5))


def test_a_backend_that_predicts_no_speed_says_so(program: Program) -> None:
    with pytest.raises(UsageError, match="backend onnx predicts no speed; ask for --backend kernel"):
        choose(program, PlansOnly(), asked(1.5))


def test_of_equal_cost_the_smallest_strip_is_taken(program: Program) -> None:
    found = choose(program, Formula(), asked(1.05, uniform=True, candidates=("64:2:8", "16:2:8")))

    assert {"16:2:8"} == set(found.patterns.values())


def test_kernels_slower_than_dense_are_no_options(program: Program) -> None:
    with pytest.raises(SparsecError, match="cannot be reached: the most is"):
        choose(program, Formula(fixed=1e3), asked(1.05))


def test_the_paper_takes_the_smallest_m_that_is_fast_enough(program: Program) -> None:
    found = choose(program, Formula(), asked(1.05, mode="paper"))
    (text,) = set(found.patterns.values())

    assert found.speed >= 1.05
    assert text is not None
    assert text.startswith("16:2:")  # of equal M, the smallest V has the most masks
    assert 4 == len(found.considered)
    assert found.front == ()


def test_the_front_loses_more_the_faster_it_is(program: Program) -> None:
    found = choose(program, Formula(), asked(1.1)).front

    assert len(found) > 2
    for one, other in itertools.pairwise(found):
        assert one.speed > other.speed
        assert one.figure < other.figure
