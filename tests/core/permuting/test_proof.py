"""The proof lets no wrong permutation pass, and names the operator."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from core.axes_models import Apply, Attention, Feed, Net, Norm, shuffled
from models import made, random
from torch import nn

from sparsec.axes import analyse, apply
from sparsec.axes import rules as axis_rules
from sparsec.errors import UsageError, VerificationError
from sparsec.permuting.proof import AGREES, prove
from sparsec.program import Program
from sparsec.tracing import trace


def traced(*blocks: nn.Module) -> Program:
    return trace(made(lambda: Net(*blocks)), {"x": random(2, 3, 5)})


def permuted(program: Program, moves_left_out: int = 0) -> Program:
    after, generator = program, torch.Generator().manual_seed(0)
    for variable in analyse(program).variables:
        partial = dataclasses.replace(variable, moves=variable.moves[moves_left_out:])
        after = apply(after, partial, shuffled(variable, generator))
    return after


def test_a_right_permutation_is_proven() -> None:
    program = traced(Feed(), Attention(served=2))

    assert prove(program, permuted(program)) <= AGREES


@pytest.mark.parametrize("block", [Feed(gated=True), Attention(), Norm(2)], ids=lambda block: type(block).__name__)
def test_a_move_left_out_is_caught(block: nn.Module) -> None:
    program = traced(block)

    with pytest.raises(VerificationError, match="the permuted program changes output output"):
        prove(program, permuted(program, moves_left_out=1))


def test_the_first_operator_that_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(Apply(lambda x: torch.relu(torch.tanh(x).cumsum(-1))))
    monkeypatch.setitem(axis_rules.RULES, "cumsum", axis_rules.RULES["relu"])

    with pytest.raises(VerificationError, match=r"other numbers is cumsum \(aten\.cumsum\.default\)"):
        prove(program, permuted(program))


def test_outputs_that_are_not_finite_prove_nothing() -> None:
    program = traced(Apply(lambda x: x / (x - x)))

    with pytest.raises(VerificationError, match="NaN or Inf on example inputs"):
        prove(program, program)


def test_a_program_that_changed_since_the_analysis_is_refused() -> None:
    small, large = traced(Feed()), traced(Feed(hidden=10))
    (hidden,) = [variable for variable in analyse(large).variables if variable.size == 10]

    with pytest.raises(UsageError, match="analyse it again"):
        apply(small, hidden, torch.arange(10))
