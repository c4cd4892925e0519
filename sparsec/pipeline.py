"""Passes and the manager that runs them: order checked first, one clone, every step verified, timed and recorded."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from sparsec.errors import RecipeError, VerificationError
from sparsec.program import FACTS, Program

if TYPE_CHECKING:
    from torch import Tensor

Equivalence = Literal["exact", "close", "lossy"]
"""What a pass does to the outputs: nothing, rounding only, or a change that is its purpose (pruning, training)."""
CLOSE = 1e-5  # relative to the largest output: a reordered fp32 sum over up to 4096 products


@dataclass(frozen=True)
class Note:
    """Something a user should know about one site: why it was skipped, what was found."""

    site: str
    text: str


@dataclass(frozen=True)
class PassResult:
    """The program after a pass, what to tell about sites, and data for the report."""

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


def quote(value: Any) -> str:
    """An option's value as recipe text: bare where that can be read back, else in double quotes."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    if re.fullmatch(r'[^\s,{}|="\\]+', text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order on a clone of a program."""

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(text: str) -> PassManager:
        """A manager for pass text such as `mask{pattern=64:2:5} | freeze`."""
        from sparsec.recipe import parse_passes  # the recipe module builds on this one

        return PassManager(parse_passes(text))

    def run(
        self,
        program: Program,
        ctx: Context | None = None,
        check: Literal["structure", "outputs"] = "structure",
        after_each: Callable[[Pass, Program], None] | None = None,
    ) -> Program:
        """The changed program; the given one stays as it is. See `run_reported`."""
        return self.run_reported(program, ctx, check, after_each)[0]

    def run_reported(
        self,
        program: Program,
        ctx: Context | None = None,
        check: Literal["structure", "outputs"] = "structure",
        after_each: Callable[[Pass, Program], None] | None = None,
    ) -> tuple[Program, tuple[PassReport, ...]]:
        """The changed program, and a report for each pass.

        The order is checked before any work. `check="outputs"` also compares the outputs on the example inputs before
        and after each pass, as its `equivalence` declares. `after_each` is called with each pass and its result.
        """
        ctx = ctx or Context()
        self.check_order(program.facts)
        program, reports = program.clone(), []
        for step, one in enumerate(self.passes):
            ctx.progress(one.name, step, len(self.passes))
            expected = program(**program.inputs) if check == "outputs" and one.equivalence != "lossy" else None
            start = time.perf_counter()
            result = one.run(program, ctx)
            program = _finish(one, result.program)
            reports.append(PassReport(str(one), time.perf_counter() - start, result.notes, result.data))
            if expected is not None:
                _compare(one, expected, program(**program.inputs))
            if after_each:
                after_each(one, program)
        ctx.progress("passes", len(self.passes), len(self.passes))
        return program, tuple(reports)

    def check_order(self, facts: Iterable[str]) -> None:
        """Raise RecipeError when a pass would run without what it requires."""
        known = set(facts)
        for one in self.passes:
            if missing := one.requires - known:
                makers = {fact: [p.name for p in self.passes if fact in p.establishes] for fact in missing}
                hint = "; ".join(
                    f"{fact} is established by {' or '.join(names)}" for fact, names in makers.items() if names
                )
                raise RecipeError(
                    f"pass {one.name} requires a program that is {' and '.join(sorted(missing))}; "
                    f"here it would be {', '.join(sorted(known))}{'; ' + hint if hint else ''}"
                )
            known = (known - one.drops) | one.establishes

    def __str__(self) -> str:
        return " | ".join(map(str, self.passes))


def _finish(one: Pass, program: Program) -> Program:
    facts = (program.facts - one.drops) | one.establishes
    assert facts <= FACTS, f"pass {one.name} establishes an unknown fact"
    program = program.replace(facts=facts, history=(*program.history, {"pass": str(one)}))
    program.verify()
    program.module.recompile()
    return program


def _compare(one: Pass, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    allowed = 0.0 if one.equivalence == "exact" else CLOSE
    for name, value in expected.items():
        difference = relative_difference(found[name], value)
        if difference > allowed:
            raise VerificationError(
                f"pass {one.name} changed output {name} by {difference:.2e}; it declares {one.equivalence}"
            )


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
