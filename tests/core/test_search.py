"""The search for patterns that meet a speedup."""

from __future__ import annotations

import math

import pytest
import torch
from fake_backend import Formula
from hypothesis import given
from hypothesis import strategies as st
from models import made
from torch import Tensor, nn

from sparsec import Pattern, Program, Recipe, trace
from sparsec.errors import SparsecError, UsageError
from sparsec.prediction import Prediction
from sparsec.search import Option, _cheapest, choose, retained

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


def test_the_choice_is_fast_enough_and_a_recipe(program: Program) -> None:
    found = choose(program, Formula(), 1.1, 64, candidates=CANDIDATES)
    recipe = Recipe.from_data({"model": "m", "targets": found.targets})

    assert found.speed >= 1.1
    assert 0 < found.retained <= 1
    assigned = {site.name: site.pattern for site in program.sites.with_targets(recipe.targets)}
    assert {name: text and Pattern.parse(text) for name, text in found.patterns.items()} == assigned


def test_one_site_at_a_time_keeps_at_least_as_much_as_one_pattern_for_all(program: Program) -> None:
    same = choose(program, Formula(), 1.1, 64, candidates=CANDIDATES, uniform=True)
    free = choose(program, Formula(), 1.1, 64, candidates=CANDIDATES)

    assert 1 == len(set(same.patterns.values()))
    assert free.retained >= same.retained * 0.97  # the two profiles differ by what the machine did meanwhile


def test_a_speedup_out_of_reach_says_the_most_and_why(program: Program) -> None:
    with pytest.raises(SparsecError, match=r"1000x cannot be reached: the most is .*outside the sites") as error:
        choose(program, Formula(), 1000, 64, candidates=CANDIDATES)
    assert 1 == error.value.exit_code


@pytest.mark.parametrize("speedup", [1.0, 0.0, -2.0, math.nan, math.inf])
def test_a_speedup_that_asks_for_nothing_is_refused(program: Program, speedup: float) -> None:
    with pytest.raises(UsageError, match="expected a number above 1"):
        choose(program, Formula(), speedup, 64)


def test_sites_without_kernel_stay_dense_with_the_reason(program: Program) -> None:
    name = program.sites.sites[0].name
    found = choose(program, Formula(without=(name,)), 1.05, 64, candidates=CANDIDATES)

    assert name not in found.patterns
    assert {name: "no kernel"} == found.left
    assert "ignore" == found.targets[name]


def test_no_kernel_at_all_is_an_error(program: Program) -> None:
    names = tuple(site.name for site in program.sites)
    with pytest.raises(SparsecError, match="no candidate has a sparse kernel here: no kernel"):
        choose(program, Formula(without=names), 1.5, 64, candidates=CANDIDATES)


def test_of_equal_cost_the_smallest_strip_is_taken(program: Program) -> None:
    found = choose(program, Formula(), 1.05, 64, candidates=("64:2:8", "16:2:8"), uniform=True)

    assert {"16:2:8"} == set(found.patterns.values())


@pytest.mark.parametrize("rows", [1, 100, 256, 257, 1000])
def test_the_retained_score_is_a_share_and_near_the_exact_one(rows: int) -> None:
    score = torch.rand(1, rows, 40, generator=torch.Generator().manual_seed(rows))
    pattern = Pattern.parse("2:4")
    mask = pattern.mask(pattern.project(score), 40)

    assert retained(pattern, score) == pytest.approx(float(score[mask].sum() / score.sum()), rel=0.02)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Option]]:
    """Sites with options: dense loses nothing and is slowest."""
    number = st.floats(0.01, 1)
    table = {}
    for site in range(draw(st.integers(1, 5))):
        scale = draw(number)
        options = [Option(text, scale * draw(number), draw(number)) for text in ("a", "b")]
        table[str(site)] = [Option(None, scale * 1.1, 0.0), *options]
    return table


@given(tables(), st.floats(1.01, 5), st.booleans())
def test_the_cheapest_is_fast_enough_where_anything_is(table: dict, speedup: float, uniform: bool) -> None:
    rest = 0.5
    dense = rest + sum(options[0].seconds for options in table.values())
    made = {text: Prediction(1, dense, rest, ()) for text in ("a", "b")}
    chosen = _cheapest(table, made, speedup, uniform)

    spent = rest + sum(one.seconds for one in chosen.values())
    same = [rest + sum(options[i].seconds for options in table.values()) for i in (1, 2)]
    fastest = rest + sum(min(one.seconds for one in options) for options in table.values())
    reachable = min(same) if uniform else fastest
    assert table.keys() == chosen.keys()
    assert spent <= max(dense / speedup, reachable) * (1 + 1e-9)
    if not uniform:
        fitting = [i for i in (1, 2) if same[i - 1] <= dense / speedup]
        lost = sum(one.lost for one in chosen.values())
        assert all(lost <= sum(options[i].lost for options in table.values()) + 1e-9 for i in fitting)
