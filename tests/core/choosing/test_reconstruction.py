"""What a pattern does to a layer's outputs, measured in the dense model."""

from __future__ import annotations

import pytest
import torch
from models import Classifier, Residual, Tied, made, random
from torch import Tensor, nn

from sparsec import Pattern, Program, trace
from sparsec.choosing.losses import losses
from sparsec.choosing.reconstruction import errors
from sparsec.errors import SparsecError
from sparsec.pipeline import no_progress

SUMS = 1e-4  # float32 Gram matrices against float64 outputs


class Shared(nn.Module):
    """Two sites of one input, then one of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.left(x)) * self.right(x))


def traced(net: nn.Module, *shape: int) -> Program:
    return trace(net, (random(*shape),))


def batches(program: Program, *shape: int, count: int = 3) -> list[dict[str, Tensor]]:
    (name,) = program.inputs
    return [{name: random(*shape, seed=i)} for i in range(count)]


def wanted(program: Program, *texts: str) -> dict[str, list[str]]:
    return {site.name: list(texts) for site in program.sites if site.eligible}


def test_the_error_is_that_of_the_layers_outputs_at_most() -> None:
    """Output by output, it is below that of masked weights, which are one of the choices that it has."""
    program = traced(made(Shared), 16, 8)
    data = batches(program, 16, 8)
    found = errors(program, wanted(program, "2:4", "1:4"), data, no_progress)

    x = torch.cat([next(iter(batch.values())) for batch in data]).double()
    weight = program.sites["left.weight"].read(program.module)[0].double()
    for text in ("2:4", "1:4"):
        pattern = Pattern.parse(text)
        dropped = weight.where(~pattern.mask(pattern.project(weight.abs().float()), 8)[0], 0.0)
        masked = float(((x @ dropped.T).square().sum(0) / (x @ weight.T).square().sum(0)).mean())
        assert 0 < found["left.weight"][text] < masked * (1 + SUMS)
    assert found["left.weight"]["2:4"] < found["left.weight"]["1:4"]
    assert {"left.weight", "right.weight", "out.weight"} == found.keys()


def test_a_weight_that_follows_the_pattern_loses_nothing() -> None:
    net = made(Shared)
    with torch.no_grad():
        net.left.weight[:, torch.arange(8) % 4 > 1] = 0
    program = traced(net, 16, 8)
    found = errors(program, wanted(program, "2:4"), batches(program, 16, 8), no_progress)

    assert found["left.weight"]["2:4"] < SUMS**2 < found["right.weight"]["2:4"]


def test_a_constant_input_is_left_to_the_bias() -> None:
    program = traced(made(Residual), 4, 5)
    (name,) = program.inputs
    same = [{name: torch.ones(6, 5)}]
    found = errors(program, {"up.weight": ["1:4"]}, same, no_progress)

    assert 0 == pytest.approx(found["up.weight"]["1:4"], abs=SUMS)


def test_a_tied_weight_is_measured_on_the_inputs_of_all_its_uses() -> None:
    program = traced(made(Tied), 4, 6)
    found = errors(program, wanted(program, "2:4"), batches(program, 4, 6), no_progress)

    assert ["first.weight"] == list(found)
    assert 0 < found["first.weight"]["2:4"] < 1


def test_inputs_that_are_not_finite_name_the_site() -> None:
    program = traced(made(Classifier), 4, 5)
    (name,) = program.inputs
    with pytest.raises(SparsecError, match=r"body\.weight: its inputs hold NaN or Inf"):
        errors(program, wanted(program, "2:4"), [{name: torch.full((4, 5), torch.inf)}], no_progress)


def test_the_program_is_not_changed() -> None:
    program = traced(made(Shared), 16, 8)
    before = {name: value.clone() for name, value in program.module.named_parameters()}
    errors(program, wanted(program, "2:4"), batches(program, 16, 8), no_progress)

    assert all(torch.equal(value, before[name]) for name, value in program.module.named_parameters())


def test_the_gradient_score_makes_a_tensor_that_nothing_reads_free() -> None:
    net = made(Shared)
    with torch.no_grad():
        net.right.weight.zero_()  # left's outputs are multiplied with 0: no gradient reaches it
    program = traced(net, 16, 8)
    found = losses(program, wanted(program, "2:4"), "sensitivity", lambda: batches(program, 16, 8), 0, no_progress)

    assert 0 == found["left.weight"]["2:4"]
    assert 0 == found["right.weight"]["2:4"]  # |w g| of a weight that is 0 is 0


@pytest.mark.parametrize("objective", ["retained", "reconstruction", "sensitivity"])
def test_a_sparser_pattern_loses_more_by_every_objective(objective: str) -> None:
    program = traced(made(Shared), 16, 8)
    found = losses(
        program, wanted(program, "2:4", "1:4"), objective, lambda: batches(program, 16, 8), 0, no_progress  # type: ignore[arg-type]
    )  # fmt: skip

    assert all(0 <= each["2:4"] < each["1:4"] or each["2:4"] == each["1:4"] == 0 for each in found.values())
    assert sum(each["2:4"] for each in found.values()) > 0
