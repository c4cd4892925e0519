"""The walk through a graph: which inputs every site sees, and what is left as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from core.oneshot.layers import CASES, ROUTED, Weighted
from models import VOCABULARY, Encoder, Residual, Tied, made, random
from torch import Tensor, nn

from sparsec import Program, _fx, trace
from sparsec.errors import PatternError, SparsecError
from sparsec.oneshot.engine import Result, prune
from sparsec.oneshot.moments import Collector
from sparsec.oneshot.solving import SOLVERS, Calibration, Method, Solver, solve
from sparsec.pattern import Pattern
from sparsec.pipeline import no_progress

ALIKE = {"rtol": 1e-4, "atol": 1e-5}  # fp32 moments of tokens in other batches
ALPS = Method()
Batches = list[dict[str, Tensor]]


class Stack(nn.Module):
    """Three layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)


def batches(*shape: int, count: int = 3) -> Batches:
    return [{"x": random(*shape, seed=seed)} for seed in range(count)]


def traced(net: nn.Module, *shape: int, pattern: str = "2:4") -> Program:
    program = trace(net, (random(*shape),))
    return program.replace(sites=program.sites.with_targets({site.name: pattern for site in program.sites}))


def pruned(program: Program, data: Sequence[dict[str, Tensor]], method: Method = ALPS) -> tuple[Program, Result]:
    clone = program.clone()
    result = prune(clone, [site for site in clone.sites if site.pattern], data, method, 0, no_progress)
    return clone.with_sites(result.sites.values()), result


def weights(program: Program) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in program.module.named_parameters()}


def by_hand(net: Stack, data: Batches, method: Method) -> list[Tensor]:
    """Layer by layer, with both streams written out."""
    x = torch.cat([batch["x"] for batch in data])
    x0, found = x, []
    for layer in net.layers:
        assert isinstance(layer, nn.Linear)
        seen = {"sequential": (x, None), "independent": (x0, None), "asymmetric": (x, x0)}[method.calibration]
        collector = Collector(8, "gram" if seen[1] is None else "cross")
        collector.add(*seen)
        solved = solve(layer.weight.detach(), Pattern.parse("2:4"), method, collector.finish("here"), None, True)
        assert solved.bias_shift is not None
        found.append(solved.weight)
        x0 = torch.relu(layer(x0)).detach()
        x = torch.relu(nn.functional.linear(x, solved.weight, layer.bias + solved.bias_shift)).detach()
    return found


# What layers see ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["asymmetric", "sequential", "independent"])
@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_each_layer_is_pruned_on_the_inputs_that_calibration_says(solver: Solver, calibration: Calibration) -> None:
    method, data = Method(solver, calibration=calibration), batches(20, 8)
    program, _ = pruned(traced(made(Stack), 20, 8), data, method)

    for i, expected in enumerate(by_hand(made(Stack), data, method)):
        torch.testing.assert_close(_fx.get_tensor(program.module, f"layers.{i}.weight"), expected, **ALIKE)


def test_asymmetric_calibration_reproduces_the_dense_outputs_best() -> None:
    program, data = traced(made(Stack), 60, 8), batches(60, 8)
    errors = []
    for calibration in ("asymmetric", "sequential", "independent"):
        after, _ = pruned(program, data, Method("alps", calibration=calibration))  # type: ignore[arg-type]
        lost = [(after(**x)["output"] - program(**x)["output"]).detach().square().sum() for x in data]
        errors.append(float(torch.stack(lost).sum()))

    assert errors[0] == min(errors)
    assert errors[0] < 0.95 * errors[1]


def test_a_score_without_update_sees_pruned_inputs_too() -> None:
    method, data = Method("none", "wanda"), batches(20, 8)
    program, result = pruned(traced(made(Stack), 20, 8), data, method)
    x, net = torch.cat([batch["x"] for batch in data]), made(Stack)
    for i, layer in enumerate(net.layers):
        assert isinstance(layer, nn.Linear)
        selection = Pattern.parse("2:4").project(layer.weight.abs() * x.square().mean(0).sqrt())
        assert torch.equal(selection.positions, result.sites[f"layers.{i}.weight"].selection.positions)  # type: ignore[union-attr]
        x = torch.relu(nn.functional.linear(x, _fx.get_tensor(program.module, f"layers.{i}.weight"), layer.bias))


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_is_pruned_on_its_own_inputs(name: str) -> None:
    program = CASES[name].program()
    (site,) = program.sites
    program = program.replace(sites=program.sites.with_targets({site.name: "2:4"}))
    dense = program(**program.inputs)["output"].detach()
    after, result = pruned(program, [program.inputs], Method("alps", bias=False))
    kept = program.sites.replace(result.sites.values())[site.name]
    error = float((after(**program.inputs)["output"].detach() - dense).norm() / dense.norm())

    assert kept.selection is not None
    assert 0 == Pattern.parse("2:4").violations_of(kept.read(after.module), kept.selection).count
    if site.shape[0] == 1:  # with several matrices it is the mean of theirs
        assert pytest.approx(error, rel=1e-3, abs=1e-3) == result.errors[site.name]
    assert error < 0.9


def test_sites_of_one_input_are_solved_as_they_would_be_alone() -> None:
    ids = [{"tokens": torch.arange(24).view(3, 8) * seed % VOCABULARY} for seed in (1, 3, 7)]
    program = trace(made(Encoder), ids[0], {"tokens": {0: "batch", 1: "length"}}, {"length": 16})
    program = program.replace(sites=program.sites.with_targets({"*": "2:4"}))
    together, found = pruned(program, ids, Method("sparsegpt"))
    for site in ("query.weight", "value.weight"):
        one = program.replace(sites=program.sites.with_targets({"*": "ignore", site: "2:4"}))
        alone, expected = pruned(one, ids, Method("sparsegpt"))
        assert pytest.approx(expected.sites[site].retained) == found.sites[site].retained
        torch.testing.assert_close(weights(alone)[site], weights(together)[site], **ALIKE)


@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["1:4", "2:4", "2:2:4"])
def test_the_share_kept_is_that_of_each_sites_own_dense_magnitude(pattern: str, solver: Solver) -> None:
    """Also where sites are solved together, and where magnitude with a refit was better than the solver."""
    ids = [{"tokens": torch.arange(24).view(3, 8) * seed % VOCABULARY} for seed in (1, 3, 7)]
    program = trace(made(Encoder), ids[0], {"tokens": {0: "batch", 1: "length"}}, {"length": 16})
    program = program.replace(sites=program.sites.with_targets({"*": pattern}))
    after, result = pruned(program, ids, Method(solver))

    for name, site in result.sites.items():
        size, kept = program.sites[name].read(program.module).abs(), after.sites[name].read(after.module)
        assert pytest.approx(float(size[kept != 0].sum() / size.sum()), rel=1e-5) == site.retained


def test_a_tied_weight_is_pruned_once_on_the_inputs_of_all_its_uses() -> None:
    program, data = traced(made(Tied), 40, 6), batches(40, 6)
    after, result = pruned(program, data, Method("sparsegpt"))
    net, x = made(Tied), torch.cat([batch["x"] for batch in data])
    collector = Collector(6, "cross")
    for seen in (x, torch.relu(net.first(x)).detach()):
        collector.add(seen, seen)
    solved = solve(
        net.first.weight.detach(), Pattern.parse("2:4"), Method("sparsegpt"), collector.finish(""), None, False
    )

    assert ["first.weight"] == list(result.sites)
    torch.testing.assert_close(weights(after)["first.weight"], solved.weight, **ALIKE)
    assert torch.equal(net.first.bias, weights(after)["first.bias"])


# What stays -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_given_weights_stay_and_equal_runs_give_equal_bits(solver: Solver) -> None:
    program, data = traced(made(Stack), 20, 8), batches(20, 8)
    before = {name: value.clone() for name, value in weights(program).items()}
    first, _ = pruned(program, data, Method(solver, "wanda"))
    second, _ = pruned(program, data, Method(solver, "wanda"))

    assert all(torch.equal(value, weights(program)[name]) for name, value in before.items())
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())
    assert not torch.equal(before["layers.0.weight"], weights(first)["layers.0.weight"])
    assert (solver == "none") == torch.equal(before["layers.0.bias"], weights(first)["layers.0.bias"])


def test_the_bias_makes_mean_outputs_those_of_the_dense_model() -> None:
    program, data = traced(made(Stack), 60, 8), batches(60, 8)
    after, _ = pruned(program, data)
    means = [torch.cat([one(**batch)["output"].detach() for batch in data]).mean(0) for one in (program, after)]

    torch.testing.assert_close(means[0], means[1], **ALIKE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_keep_their_type(dtype: torch.dtype) -> None:
    program = trace(made(Stack).to(dtype), (random(20, 8).to(dtype),))
    program = program.replace(sites=program.sites.with_targets({"layers.0.weight": "2:4", "layers.1.weight": "4:2:5"}))
    after, result = pruned(program, [{"x": random(20, 8).to(dtype)}])

    assert {dtype} == {value.dtype for value in weights(after).values()}
    assert ["layers.0.weight", "layers.1.weight"] == list(result.sites)
    assert torch.isfinite(after(random(20, 8).to(dtype))["output"]).all()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_an_expert_without_tokens_is_pruned_by_magnitude_with_a_note() -> None:
    program = ROUTED.program()
    program = program.replace(sites=program.sites.with_targets({"weight": "2:4"}))
    after, result = pruned(program, [program.inputs])
    dense, pattern = program.sites["weight"].read(program.module)[1], Pattern.parse("2:4")
    mask = pattern.mask(pattern.project(dense.abs()), 5)[0]

    torch.testing.assert_close(dense.where(mask, 0.0), after.sites["weight"].read(after.module)[1])
    assert "matrix 1: its inputs are always 0, so weights were chosen by magnitude" == result.notes["weight"]
    assert not result.unreached


class Routes(nn.Module):
    """A layer whose outputs decide which expert a token goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        second = hidden.sum(1) > 0
        ends = torch.stack([(~second).sum(), (~second).sum() + second.sum()])
        routed = hidden[second.int().argsort(stable=True)]
        return torch.ops.sparsec.expert_linear(routed, ends, self.experts)


def test_experts_that_get_other_tokens_than_in_the_dense_model_are_pruned_on_their_own() -> None:
    program, data = traced(made(Routes), 50, 8), batches(50, 8, count=1)
    after, _ = pruned(program, data, Method("sparsegpt"))
    routes = [int((one.first(data[0]["x"]).sum(1) > 0).sum()) for one in (made(Routes), written(after))]
    hidden = written(after).first(data[0]["x"]).detach()
    collector = Collector(8, "cross")
    collector.add(*[hidden[hidden.sum(1) > 0]] * 2)
    dense = made(Routes).experts[1].T.detach()
    expected = solve(dense, Pattern.parse("2:4"), Method("sparsegpt"), collector.finish("here"), None, False)

    assert routes[0] != routes[1]
    torch.testing.assert_close(after.sites["experts"].read(after.module)[1], expected.weight, **ALIKE)


def written(program: Program) -> Routes:
    net = made(Routes)
    program.write_back(net)
    return net


def test_a_site_that_no_token_reaches_is_named() -> None:
    net = Weighted((3, 5, 4), lambda x, w: torch.ops.sparsec.expert_linear(x[:0], torch.tensor([0, 0, 0]), w))
    program = trace(net.eval(), (random(5, 5),), dynamic={})
    program = program.replace(sites=program.sites.with_targets({"weight": "2:4"}))
    after, result = pruned(program, [program.inputs])

    assert (["weight"], {}) == (result.unreached, result.sites)
    assert torch.equal(weights(program)["weight"], weights(after)["weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site_that_reads_them(value: float) -> None:
    data = batches(20, 8)
    data[1]["x"][3, 4] = value

    with pytest.raises(SparsecError, match=r"layers\.0\.weight: its inputs hold NaN or Inf"):
        pruned(traced(made(Stack), 20, 8), data)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weight_that_is_not_finite_is_refused_by_name(solver: Solver) -> None:
    net = made(Residual)
    with torch.no_grad():
        net.down.weight[0, 0] = float("nan")

    with pytest.raises(PatternError, match=r"down\.weight: the weight holds NaN or Inf; repair the checkpoint"):
        pruned(traced(net, 4, 5), batches(4, 5), Method(solver))


def test_an_error_of_a_solver_names_the_site() -> None:
    program = traced(made(Stack), 20, 8, pattern="unstructured:0.5")

    with pytest.raises(PatternError, match=r"layers\.0\.weight: unstructured:0\.5: solver sparsegpt needs groups"):
        pruned(program, batches(20, 8), dataclasses.replace(Method(), solver="sparsegpt"))
