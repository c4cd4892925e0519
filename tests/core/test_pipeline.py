"""The manager checks the order first, works on a clone, and believes no pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from models import Classifier, Residual, made, random
from torch import Tensor

from sparsec import Context, Pass, PassManager, PassResult, Program, _fx, trace
from sparsec.errors import GraphError, PassError, RecipeError, SparsecError, VerificationError
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

    with pytest.raises(RecipeError, match=r"needs-frozen \(after counter\) requires a program that is frozen"):
        PassManager((Counter(), NeedsFrozen())).run(program)
    assert [] == Counter.runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "freeze",
            "pass freeze requires a program that is masked; here it would be traced; "
            "masked is established by mask: add it before freeze",
        ),
        ("freeze | mask{pattern=2:4}", "masked is established by mask: put mask before freeze"),
        (
            "mask{pattern=2:4} | lower",
            "pass lower (after mask{pattern=2:4}) requires a program that is frozen; here it would be "
            "masked, selected, traced; frozen is established by freeze or oneshot: add it before lower",
        ),
        (
            "mask{pattern=2:4} | freeze | freeze",
            "pass freeze (after mask{pattern=2:4} | freeze) requires a program that is masked; here it would be "
            "frozen, selected, traced; it is no longer masked after freeze: leave the second freeze out",
        ),
        (
            "mask{pattern=2:4} | freeze | lower | mask",
            "here it would be lowered, selected; it is no longer traced after lower: put mask before it",
        ),
    ],
)
def test_what_is_missing_is_said(text: str, message: str, program: Program) -> None:
    with pytest.raises(RecipeError) as caught:
        PassManager.parse(text).run(program)
    assert message in str(caught.value)


def test_what_no_pass_establishes_is_asked_of_the_program(program: Program) -> None:
    lowered = PassManager.parse("mask{pattern=2:4} | freeze | lower").run(program)

    with pytest.raises(RecipeError, match="no pass establishes traced: start from a program that is traced"):
        PassManager.parse("mask").run(lowered)


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


def test_the_data_of_a_report_can_be_written_as_json(program: Program) -> None:
    data = {"loss": math.nan, 3: (1, math.inf), "path": Path("x"), "nested": {"ok": True, "none": None, "half": 0.5}}
    _, (report,) = PassManager((broken(lambda program: PassResult(program, data=data)),)).run_reported(program)

    expected = {"loss": "nan", "3": [1, "inf"], "path": "x", "nested": {"ok": True, "none": None, "half": 0.5}}
    assert expected == report.data == json.loads(json.dumps(report.data, allow_nan=False))


def test_before_each_sees_every_pass_with_what_it_gets(program: Program) -> None:
    seen = []
    PassManager.parse("mask{pattern=2:4} | freeze").run(
        program, before_each=lambda one, then: seen.append((one.name, sorted(then.facts)))
    )

    assert [("mask", ["traced"]), ("freeze", ["masked", "selected", "traced"])] == seen


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
    with pytest.raises(VerificationError, match=r"pass scale: it changed output output by .*; it declares exact"):
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
    with pytest.raises(GraphError, match=r"pass untyped \(after counter\): node alias_default has no type"):
        PassManager((Counter(), Untyped())).run(program)


def test_a_graph_that_is_not_well_formed_is_refused(program: Program) -> None:
    with pytest.raises(GraphError, match="pass torn: the graph is not well formed"):
        PassManager((Torn(),)).run(program)


def broken(body: Callable[[Program], Any], kind: Equivalence = "exact", **facts: frozenset[str]) -> Pass:
    """A pass `third` that does what `body` says."""

    @dataclass(frozen=True)
    class Third(Pass):
        """A third party's pass."""

        name: ClassVar[str] = "third"
        equivalence: ClassVar[Equivalence] = kind
        requires: ClassVar[frozenset[str]] = facts.get("requires", frozenset())
        establishes: ClassVar[frozenset[str]] = facts.get("establishes", frozenset())
        drops: ClassVar[frozenset[str]] = facts.get("drops", frozenset())

        def run(self, program: Program, ctx: Context) -> PassResult:
            result: PassResult = body(program)
            return result

    return Third()


def first_linear(program: Program) -> Any:
    return next(iter(_fx.calls(program.module.graph, torch.ops.aten.linear.default)))


def foreign_operator(program: Program) -> PassResult:
    node = next(iter(_fx.calls(program.module.graph, torch.ops.aten.gelu.default)))
    _fx.replace(node, _fx.call(node, torch.ops.aten.rand_like.default, (node.args[0],), node.meta["type"], "noise"))
    return PassResult(program)


def object_argument(program: Program) -> PassResult:
    node = first_linear(program)
    node.args = (*node.args[:2], object())
    return PassResult(program)


def unknown_output(program: Program) -> PassResult:
    output = next(node for node in program.module.graph.nodes if node.op == "output")
    output.args = ({"result": output.args[0]["output"]},)
    return PassResult(program)


def other_shape(program: Program) -> PassResult:
    output = next(node for node in program.module.graph.nodes if node.op == "output")
    last = output.args[0]["output"]
    output.args = ({"output": _fx.call(output, torch.ops.aten.t.default, (last,), last.meta["type"], "turned")},)
    return PassResult(program)


def wrong_operand(program: Program) -> PassResult:
    node = first_linear(program)
    node.args = (node.args[0], node.args[2], node.args[1])
    return PassResult(program)


def lost_weight(program: Program) -> PassResult:
    _fx.delete_tensor(program.module, "up.weight")
    return PassResult(program)


def no_output(program: Program) -> PassResult:
    graph = program.module.graph
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    return PassResult(program)


def dropped_mask(program: Program) -> PassResult:
    return PassResult(program.with_sites([site.replace(mask=None) for site in program.sites]))


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (lambda program: None, PassError, r"run must return PassResult\(program, notes, data\), found NoneType"),
        (lambda program: program, PassError, r"run must return PassResult\(program, notes, data\), found Program"),
        (lambda program: PassResult(program.module), PassError, "found PassResult of GraphModule"),
        (lambda program: PassResult(program, ["text"]), PassError, "notes of its result must be a tuple of Note"),
        (lambda program: 1 / 0, PassError, "failed with ZeroDivisionError: division by zero; nothing of the run is"),
        (lambda program: program.sites["typo"], PassError, "failed with KeyError: 'typo'"),
        (foreign_operator, GraphError, r"operator aten\.rand_like\.default is not on sparsec's allow-list"),
        (object_argument, SparsecError, "object"),
        (lost_weight, GraphError, r"up\.weight"),
        (no_output, SparsecError, "returns nothing"),
        (unknown_output, VerificationError, "the outputs are now result; they were output"),
        (other_shape, VerificationError, r"output output is now float32 \(5, 3\); it was float32 \(3, 5\)"),
        (wrong_operand, PassError, "failed with RuntimeError: "),
    ],
)
def test_a_pass_that_breaks_something_is_refused_by_name(
    body: Callable[[Program], Any], error: type[Exception], message: str, program: Program
) -> None:
    before = program.dump(hashes=True)

    with pytest.raises(error, match=message) as caught:
        PassManager((Counter(), broken(body, "lossy"), Counter())).run(program, check="outputs")
    assert str(caught.value).startswith("pass third (after counter)")
    assert "\n" not in str(caught.value)
    assert before == program.dump(hashes=True)


def test_what_a_pass_raises_is_kept_as_the_cause(program: Program) -> None:
    with pytest.raises(PassError) as caught:
        PassManager((broken(lambda program: 1 / 0),)).run(program)

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_sparsec_keeps_its_type_and_gets_the_pass(program: Program) -> None:
    with pytest.raises(RecipeError, match="pass mask: no site has a pattern"):
        PassManager.parse("mask").run(program)


def test_memory_that_runs_out_is_not_the_passes_fault(program: Program) -> None:
    def starve(program: Program) -> PassResult:
        raise MemoryError

    with pytest.raises(MemoryError):
        PassManager((broken(starve),)).run(program)


def test_an_error_of_a_watcher_is_not_blamed_on_the_pass(program: Program) -> None:
    def watch(one: Pass, program: Program) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"^disk full$"):
        PassManager((Counter(),)).run(program, after_each=watch)


def test_a_write_in_place_is_refused(program: Program) -> None:
    def scale(program: Program) -> PassResult:
        with torch.no_grad():
            _fx.get_tensor(program.module, "up.weight").mul_(1.0)
        return PassResult(program)

    with pytest.raises(PassError, match=r"pass third: it wrote into up\.weight in place, .* use Site\.write"):
        PassManager((broken(scale),)).run(program)


def test_facts_must_be_true(program: Program) -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(program)
    fact = frozenset({"masked"})

    with pytest.raises(PassError, match=r"leaves the mask up\.weight_mask but not the fact masked"):
        PassManager((broken(PassResult, drops=fact),)).run(masked)
    with pytest.raises(PassError, match="leaves the fact masked but no site with a mask"):
        PassManager((broken(PassResult, establishes=fact),)).run(program)
    with pytest.raises(PassError, match="leaves the fact masked but no site with a mask"):
        PassManager((broken(dropped_mask),)).run(masked)
    with pytest.raises(PassError, match="leaves the fact selected but no site with a selection"):
        PassManager((broken(PassResult, establishes=frozenset({"selected"})),)).run(program)


class NotDecorated(Pass):
    """A pass whose options would be lost."""

    name: ClassVar[str] = "not-decorated"
    equivalence: ClassVar[Equivalence] = "exact"
    share: float = 0.5


@pytest.mark.parametrize(
    ("one", "message"),
    [
        (Counter, "a type is no pass; expected an instance of a frozen dataclass derived from"),
        ("freeze", "a str is no pass"),
        (NotDecorated(), r"its options are lost; decorate the class with @dataclass\(frozen=True\)"),
        (broken(PassResult, "exactly"), "expected an equivalence of exact or close or lossy, found 'exactly'"),
        (broken(PassResult, establishes=frozenset({"quantized"})), "establishes is .*quantized.*expected a frozenset"),
        (broken(PassResult, drops={"masked"}), "drops is {'masked'}; expected a frozenset of"),
        (broken(PassResult, requires="masked"), "requires is 'masked'; expected a frozenset of"),
    ],
)
def test_what_is_no_proper_pass_is_refused_before_any_work(one: Any, message: str, program: Program) -> None:
    Counter.runs.clear()

    with pytest.raises(PassError, match=message):
        PassManager((Counter(), one)).run(program)
    assert [] == Counter.runs


# Resumption -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_a_run_that_is_saved_and_resumed_gives_the_same_files(split: int, tmp_path: Path) -> None:
    passes = PassManager.parse("mask{pattern=3:2:5, columns=exact} | freeze | lower").passes
    program = trace(made(Classifier), (random(3, 5),))
    whole = PassManager(passes).run(program)
    saved = Program.load(PassManager(passes[:split]).run(program).save(tmp_path / "saved"))
    resumed = PassManager(passes[split:]).run(saved)

    assert whole.dump(hashes=True) == resumed.dump(hashes=True)
    assert (whole.facts, whole.history) == (resumed.facts, resumed.history)
    whole.save(tmp_path / "whole")
    resumed.save(tmp_path / "resumed")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert {"graph.json", "weights.safetensors", "selections.safetensors"} <= set(names)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes(), name


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
