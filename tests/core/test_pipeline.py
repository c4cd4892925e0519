"""The manager checks the order first, works on a clone, and believes no pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import Residual, made, random
from torch import Tensor

from sparsec import Context, Pass, PassManager, PassResult, Program, _fx, trace
from sparsec.errors import GraphError, RecipeError, SparsecError, VerificationError
from sparsec.pipeline import CLOSE, Equivalence, Note, relative_difference


@pytest.fixture
def program() -> Program:
    return trace(made(Residual), (random(3, 5),))


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply a weight and declare whatever the test wants."""

    name: ClassVar[str] = "scale"
    equivalence: ClassVar[Equivalence] = "exact"

    by: float = 1.0

    def run(self, program: Program, ctx: Context) -> PassResult:
        site = program.sites["up.weight"]
        site.write(program.module, site.read(program.module) * self.by)
        return PassResult(program, (Note(site.name, "scaled"),), {"by": self.by})


@dataclass(frozen=True)
class ScaleClose(Scale):
    """The same, declared close."""

    equivalence: ClassVar[Equivalence] = "close"


@dataclass(frozen=True)
class ScaleLossy(Scale):
    """The same, declared lossy."""

    equivalence: ClassVar[Equivalence] = "lossy"


@dataclass(frozen=True)
class Untyped(Pass):
    """Insert a node past `_fx`."""

    name: ClassVar[str] = "untyped"
    equivalence: ClassVar[Equivalence] = "exact"

    def run(self, program: Program, ctx: Context) -> PassResult:
        graph = program.module.graph
        node = next(iter(_fx.calls(graph, torch.ops.aten.linear.default)))
        with graph.inserting_after(node):
            copied = graph.call_function(torch.ops.aten.alias.default, (node,))
        node.replace_all_uses_with(copied, delete_user_cb=lambda user: user is not copied)
        return PassResult(program)


@dataclass(frozen=True)
class Torn(Pass):
    """Use a value before it is made."""

    name: ClassVar[str] = "torn"
    equivalence: ClassVar[Equivalence] = "exact"

    def run(self, program: Program, ctx: Context) -> PassResult:
        nodes = list(_fx.calls(program.module.graph, torch.ops.aten.linear.default))
        nodes[0].prepend(nodes[1])
        return PassResult(program)


@dataclass(frozen=True)
class Counter(Pass):
    """Count its runs."""

    name: ClassVar[str] = "counter"
    equivalence: ClassVar[Equivalence] = "exact"
    runs: ClassVar[list[str]] = []

    def run(self, program: Program, ctx: Context) -> PassResult:
        self.runs.append("run")
        return PassResult(program)


@dataclass(frozen=True)
class NeedsFrozen(Counter):
    """Require what nothing here establishes."""

    name: ClassVar[str] = "needs-frozen"
    requires: ClassVar[frozenset[str]] = frozenset({"frozen"})


# Order ----------------------------------------------------------------------------------------------------------------


def test_a_wrong_order_is_refused_before_any_work(program: Program) -> None:
    Counter.runs.clear()

    with pytest.raises(RecipeError, match="needs-frozen requires a program that is frozen; here it would be traced"):
        PassManager((Counter(), NeedsFrozen())).run(program)
    assert [] == Counter.runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("freeze", "freeze requires a program that is masked; here it would be traced"),
        ("freeze | mask{pattern=2:4}", "masked is established by mask"),
        ("mask{pattern=2:4} | lower", "lower requires a program that is frozen"),
        ("mask{pattern=2:4} | freeze | freeze", "freeze requires a program that is masked"),
    ],
)
def test_what_is_missing_is_said(text: str, message: str, program: Program) -> None:
    with pytest.raises(RecipeError, match=message):
        PassManager.parse(text).run(program)


def test_facts_that_a_program_has_count(program: Program) -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(program)
    frozen = PassManager.parse("freeze").run(masked)

    assert {"traced", "selected", "masked"} == masked.facts
    assert {"traced", "selected", "frozen"} == frozen.facts


# Runs -----------------------------------------------------------------------------------------------------------------


def test_the_given_program_stays_as_it_is(program: Program) -> None:
    before, outputs = program.dump(), program(random(3, 5))["output"]
    weights = {name: p.detach().clone() for name, p in program.module.named_parameters()}
    PassManager.parse("mask{pattern=2:4} | freeze | lower").run(program)

    assert before == program.dump()
    assert ({"traced"}, ()) == (program.facts, program.history)
    assert torch.equal(outputs, program(random(3, 5))["output"])
    assert all(torch.equal(weights[name], p) for name, p in program.module.named_parameters())


def test_a_failing_pass_leaves_the_program_as_it_is(program: Program) -> None:
    before = program.dump()

    with pytest.raises(GraphError):
        PassManager((Scale(2.0), Untyped())).run(program)
    assert before == program.dump()


def test_history_tells_what_was_done_in_order(program: Program) -> None:
    done = PassManager.parse("mask{columns=l1, pattern=2:4} | freeze").run(program)

    assert ({"pass": "mask{pattern=2:4, columns=l1}"}, {"pass": "freeze"}) == done.history


def test_equal_passes_and_programs_give_equal_results(program: Program) -> None:
    manager = PassManager.parse("mask{pattern=3:2:5} | freeze")
    first, second = manager.run(program), manager.run(program)

    assert first.dump() == second.dump()
    assert torch.equal(first(random(3, 5))["output"], second(random(3, 5))["output"])


def test_a_report_holds_text_time_notes_and_data(program: Program) -> None:
    _, (report,) = PassManager((ScaleLossy(2.0),)).run_reported(program)

    assert "scale{by=2.0}" == report.text
    assert report.seconds >= 0
    assert ((Note("up.weight", "scaled"),), {"by": 2.0}) == (report.notes, report.data)


def test_after_each_sees_every_pass_with_its_result(program: Program) -> None:
    seen = []
    PassManager.parse("mask{pattern=2:4} | freeze").run(
        program, after_each=lambda one, then: seen.append((one.name, "masked" in then.facts))
    )

    assert [("mask", True), ("freeze", False)] == seen


def test_progress_is_told(program: Program) -> None:
    told: list[tuple[str, int, int]] = []
    PassManager.parse("mask{pattern=2:4} | freeze").run(program, Context(progress=lambda *step: told.append(step)))

    assert ("passes", 2, 2) == told[-1]
    assert {"mask", "freeze", "passes"} == {task for task, _, _ in told}


def test_no_passes_change_nothing(program: Program) -> None:
    assert program.dump() == PassManager(()).run(program).dump()


# Distrust -------------------------------------------------------------------------------------------------------------


def test_a_pass_that_claims_to_be_exact_is_compared(program: Program) -> None:
    with pytest.raises(VerificationError, match=r"pass scale changed output output by .*; it declares exact"):
        PassManager((Scale(1.001),)).run(program, check="outputs")


def test_a_pass_that_claims_to_be_close_may_round(program: Program) -> None:
    PassManager((ScaleClose(1 + CLOSE / 100),)).run(program, check="outputs")

    with pytest.raises(VerificationError, match="it declares close"):
        PassManager((ScaleClose(1.001),)).run(program, check="outputs")


def test_a_lossy_pass_may_change_outputs(program: Program) -> None:
    PassManager((ScaleLossy(2.0),)).run(program, check="outputs")


def test_passes_do_what_they_declare(program: Program) -> None:
    PassManager.parse("mask{pattern=2:4} | freeze | lower").run(program, check="outputs")


def test_a_node_without_type_is_refused(program: Program) -> None:
    with pytest.raises(GraphError, match="has no type"):
        PassManager((Untyped(),)).run(program)


def test_a_graph_that_is_not_well_formed_is_refused(program: Program) -> None:
    with pytest.raises(SparsecError):
        PassManager((Torn(),)).run(program)


def test_a_pass_is_a_value() -> None:
    assert Scale(2.0) == Scale(2.0)
    assert hash(Scale(2.0)) == hash(Scale(2.0))
    with pytest.raises(AttributeError):
        Scale(2.0).by = 3.0  # type: ignore[misc]


# Differences ----------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.5], [1.0, 2.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0], [-0.0], 0.0),
        ([], [], 0.0),
        ([NAN, 1.0], [NAN, 1.0], 0.0),
        ([INF, 1.0], [INF, 1.0], 0.0),
        ([-INF, 1.0], [INF, 1.0], INF),
        ([NAN, 1.0], [0.0, 1.0], INF),
        ([0.0, 1.0], [NAN, 1.0], INF),
        ([INF, 1.0], [0.0, 1.0], INF),
        ([0.0, 1.0], [INF, 1.0], INF),
        ([NAN, 1.5], [NAN, 1.0], 0.5),
        ([INF, 1.5], [INF, 1.0], 0.5),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_differences_are_relative_to_the_largest_value(
    found: list[float], expected: list[float], difference: float
) -> None:
    assert difference == relative_difference(torch.tensor(found), torch.tensor(expected))


def test_integers_and_halves_are_compared_exactly() -> None:
    def difference(dtype: torch.dtype) -> float:
        a = torch.tensor([1, 4], dtype=dtype)
        b: Tensor = torch.tensor([1, 2], dtype=dtype)
        return relative_difference(a, b)

    assert [1.0] * 3 == [difference(dtype) for dtype in (torch.int64, torch.bfloat16, torch.float16)]
