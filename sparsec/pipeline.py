"""Passes and the manager that runs them: order checked first, one clone, every step verified, timed and recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

from sparsec import invariants
from sparsec.errors import PassError, RecipeError, SparsecError, UsageError, VerificationError
from sparsec.program import FACTS, Program

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.cost import Cost
    from sparsec.data import Calibration

Equivalence = Literal["exact", "close", "lossy"]
"""What a pass does to the outputs: nothing, rounding only, or a change that is its purpose (pruning, training)."""
CLOSE = 1e-5  # relative to the largest output: a reordered fp32 sum over up to 4096 products
CLOSE_IN = {"bfloat16": 2e-2, "float16": 5e-3}  # 8 and 11 bits, 0.4 and 0.05 % a rounding: sums of many grow slower
ALLOWED = {"exact": 0.0, "close": CLOSE, "lossy": float("inf")}
CheckLevel = Literal["structure", "outputs"]
NAME = re.compile(r"[a-z][a-z0-9-]*")  # of a pass or backend: needs no quotes in pass text and on a command line


@dataclass(frozen=True)
class Note:
    """Something a user should know about one site: why it was skipped, what was found."""

    site: str
    text: str


@dataclass(frozen=True)
class PassResult:
    """The program after a pass, what to tell about sites, and data for the report.

    `targets` in the data: a pass that chose patterns says so; `compile` stores them in the recipe in its place.
    """

    program: Program
    notes: tuple[Note, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassReport:
    """What one pass of a run did."""

    text: str
    seconds: float
    notes: tuple[Note, ...]
    data: dict[str, Any]


class Progress(Protocol):
    """Where a long pass says how far it is."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """`done` of `total` steps of `task` are finished."""


def no_progress(task: str, done: int, total: int) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Context:
    """The only outside a pass sees."""

    seed: int = 0
    progress: Progress = no_progress
    resources: dict[str, Any] = field(default_factory=dict)
    """Objects that pass options name as text: data sets, a teacher."""
    cost: Cost | None = None
    """Predicted seconds of a layer's product on this machine, where somebody knows them."""
    workdir: Path | None = None
    """Where a long pass may keep finished parts, in a folder of its name, to go on from when it was interrupted."""

    def calibration(self, who: str) -> Calibration:
        """The calibration data, made on the first call. Raises UsageError for pass `who` when there is none.

        `resources["calibration"]` is the data, or a function that gives it.
        """
        found = self.resources.get("calibration")
        if found is None:
            raise UsageError(
                f"pass {who} needs calibration data: give --calib DATA, in Python calibration=..., or to a pass "
                'manager Context(resources={"calibration": ...})'
            )
        made: Calibration = found() if callable(found) else found
        return made


@dataclass(frozen=True)
class Pass:
    """A change of a program, as a value: equal fields, seed and program give an equal result.

    Subclasses are frozen dataclasses whose fields are the options of the pass's text form, `name{field=value, ...}`.
    `run` gets a program it may edit (the manager has cloned it) and inserts nodes through `_fx` only.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    establishes: ClassVar[frozenset[str]] = frozenset()
    drops: ClassVar[frozenset[str]] = frozenset()
    equivalence: ClassVar[Equivalence]
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # an unknown option is an error

    def run(self, program: Program, ctx: Context) -> PassResult:
        """Change the program. Facts, history, lint and recompile are the manager's work."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The pass as text, with the options that differ from their defaults."""
        options = [
            f"{f.name}={quote(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{', '.join(options)}}}" if options else "")


_ADVISED = 2  # passes named where one of several would help
Watcher = Callable[[Pass, Program], None]
"""Looks at a program before or after a pass; must not change it."""


def quote(value: Any) -> str:
    """An option's value as recipe text: bare where that can be read back, else in double quotes."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r'[^\s,{}|="\\]+', text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order on a clone of a program, and believes none of them."""

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(text: str) -> PassManager:
        """A manager for pass text such as `mask{pattern=64:2:5} | freeze`."""
        from sparsec.recipe import parse_passes  # the recipe module builds on this one

        return PassManager(parse_passes(text))

    def run(
        self, program: Program, ctx: Context | None = None, check: CheckLevel = "structure", **watchers: Watcher
    ) -> Program:
        """The changed program; the given one stays as it is. See `run_reported`, of which this is the first result."""
        return self.run_reported(program, ctx, check, **watchers)[0]

    def run_reported(
        self,
        program: Program,
        ctx: Context | None = None,
        check: CheckLevel = "structure",
        before_each: Watcher | None = None,
        after_each: Watcher | None = None,
    ) -> tuple[Program, tuple[PassReport, ...]]:
        """The changed program, and a report for each pass.

        The order is checked before any work. After each pass the graph, the sites, the facts and the origin's tensors
        are checked; `check="outputs"` also compares the outputs on the example inputs as `equivalence` declares.
        `before_each` and `after_each` are called with each pass and the program as it then stands. Raises the pass's
        own SparsecError with the pass named, PassError for whatever else it raises or breaks.
        """
        ctx = ctx or Context()
        self.check_order(program.facts)
        given, program, reports = program, program.clone(), []
        outputs = _outputs(program) if check == "outputs" and self.passes else None
        for step, one in enumerate(self.passes):
            ctx.progress(one.name, step, len(self.passes))
            if before_each:
                before_each(one, program)
            shared, start = invariants.snapshot(given), time.perf_counter()
            with _blamed(self._place(step)):
                result = _checked(one.run(program, ctx))
                program = _finish(one, result.program, shared)
                seconds = time.perf_counter() - start
                if outputs is not None:
                    outputs = _compare(one, outputs, _outputs(program))
            reports.append(PassReport(str(one), seconds, result.notes, invariants.plain(result.data)))
            if after_each:
                after_each(one, program)
        ctx.progress("passes", len(self.passes), len(self.passes))
        return program, tuple(reports)

    def check_order(self, facts: Iterable[str]) -> None:
        """Raise RecipeError when a pass would run without what it requires, PassError when one is no proper pass."""
        for one in self.passes:
            if problem := contract_problem(type(one)):
                raise PassError(problem)
        known, lost = set(facts), dict[str, str]()
        for step, one in enumerate(self.passes):
            if missing := sorted(one.requires - known):
                raise RecipeError(
                    f"{self._place(step)} requires a program that is {' and '.join(missing)}; here it would be "
                    f"{', '.join(sorted(known))}; {'; '.join(self._advice(step, fact, lost) for fact in missing)}"
                )
            lost |= dict.fromkeys(one.drops & known, one.name)
            known = (known - one.drops) | one.establishes

    def _place(self, step: int) -> str:
        """`pass freeze (after mask{pattern=2:4})`."""
        before = f" (after {PassManager(self.passes[:step])})" if step else ""
        return f"pass {self.passes[step].name}{before}"

    def _advice(self, step: int, fact: str, lost: dict[str, str]) -> str:
        """What to do about a fact that the pass at `step` misses. `lost`: fact -> the earlier pass that dropped it."""
        from sparsec.recipe import passes_that_establish  # the recipe module builds on this one

        name = self.passes[step].name
        if fact in lost:
            where = f"put {name} before it" if lost[fact] != name else f"leave the second {name} out"
            return f"it is no longer {fact} after {lost[fact]}: {where}"
        if later := next((one.name for one in self.passes[step + 1 :] if fact in one.establishes), None):
            return f"{fact} is established by {later}: put {later} before {name}"
        if makers := passes_that_establish(fact):
            return f"{fact} is established by {' or '.join(makers[:_ADVISED])}: add it before {name}"
        return f"no pass establishes {fact}: start from a program that is {fact}"

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))


def contract_problem(cls: type) -> str | None:
    """Why a class cannot be a pass, or None."""
    if not issubclass(cls, Pass):
        return f"a {cls.__name__} is no pass; expected an instance of a frozen dataclass derived from sparsec.Pass"
    name, where = getattr(cls, "name", None), f"pass {cls.__module__}.{cls.__qualname__}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        return f"{where}: expected a name of lower-case letters, digits and dashes, found {name!r}"
    if "__dataclass_fields__" not in vars(cls):
        return f"{where}: its options are lost; decorate the class with @dataclass(frozen=True)"
    if getattr(cls, "equivalence", None) not in get_args(Equivalence):
        words = " or ".join(get_args(Equivalence))
        return f"{where}: expected an equivalence of {words}, found {getattr(cls, 'equivalence', None)!r}"
    for key in ("requires", "establishes", "drops"):
        facts = getattr(cls, key)
        if not isinstance(facts, frozenset) or facts - FACTS:
            return f"{where}: {key} is {facts!r}; expected a frozenset of {', '.join(sorted(FACTS))}"
    return None


@contextlib.contextmanager
def _blamed(place: str) -> Iterator[None]:
    """Name the pass in every error. The program was verified before the pass, so the pass is to blame."""
    try:
        yield
    except SparsecError as error:
        error.args = (f"{place}: {error}",)
        raise
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise PassError(
            f"{place} failed with {type(error).__name__}: {reason}; nothing of the run is kept. This is a fault of the "
            "pass: --debug shows where; tell its author"
        ) from error


def _checked(result: Any) -> PassResult:
    if not isinstance(result, PassResult) or not isinstance(result.program, Program):
        inner = f" of {type(result.program).__name__}" if isinstance(result, PassResult) else ""
        raise PassError(f"run must return PassResult(program, notes, data), found {type(result).__name__}{inner}")
    if not isinstance(result.notes, tuple) or not all(isinstance(note, Note) for note in result.notes):
        raise PassError("the notes of its result must be a tuple of Note")
    return result


def _finish(one: Pass, program: Program, shared: invariants.Snapshot) -> Program:
    facts = (program.facts - one.drops) | one.establishes
    program = program.replace(facts=facts, history=(*program.history, {"pass": str(one)}))
    program.verify()
    invariants.check(program, shared)
    program.module.recompile()
    return program


def _outputs(program: Program) -> dict[str, Tensor]:
    # Gradients stay on: under no_grad torch may multiply a parameter and a masked copy of it in different orders.
    return {name: value.detach() for name, value in program(**program.inputs).items()}


def _compare(one: Pass, expected: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    if list(found) != list(expected):
        raise VerificationError(f"the outputs are now {', '.join(found)}; they were {', '.join(expected)}")
    for name, value in expected.items():
        if found[name].shape != value.shape or found[name].dtype != value.dtype:
            now, then = (f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") for x in (found[name], value))
            raise VerificationError(f"output {name} is now {now}; it was {then}")
        difference = relative_difference(found[name], value)
        allowed = ALLOWED[one.equivalence]
        if one.equivalence == "close":
            allowed = CLOSE_IN.get(str(value.dtype).removeprefix("torch."), allowed)
        if difference > allowed:
            limit = f"it declares {one.equivalence} ({allowed:.0e} is allowed)"
            raise VerificationError(f"it changed output {name} by {difference:.2e}; {limit}")
    return found


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest finite expected value.

    NaN or Inf at the same place on both sides is no difference; on one side only it makes the result Inf.
    """
    import torch

    found, expected = found.detach().double(), expected.detach().double()
    if found.shape != expected.shape:
        return float("inf")
    unequal = (found != expected) & ~(found.isnan() & expected.isnan())
    if not bool(unequal.any()):
        return 0.0
    largest = torch.nan_to_num(expected, 0.0, 0.0, 0.0).abs().max().clamp(min=1e-30)
    difference = float((found - expected)[unequal].abs().max() / largest)
    return difference if difference == difference else float("inf")
