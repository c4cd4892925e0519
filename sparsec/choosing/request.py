"""What is asked of a choice of patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from sparsec.choosing.diversity import Diversity
from sparsec.choosing.options import BUDGETS, OBJECTIVES, Budget, Objective
from sparsec.errors import UsageError
from sparsec.layout import Values
from sparsec.pattern import Dense, Pattern

CANDIDATES = ("2:4", *(f"{v}:2:{m}" for m in (5, 6, 8, 10, 12, 16, 32) for v in (16, 32, 64, 128)))
Mode = Literal["ours", "paper"]
"""Site by site under the budget; or one V and M for all, by the rule of "Beyond 2:4"."""
MODES: tuple[Mode, ...] = get_args(Mode)
_ASKED = {
    "speedup": "a number above 1, such as 1.5 (times faster than dense)",
    "latency": "a number above 0, such as 12.5 (milliseconds of a run)",
    "density": "a number between 0 and 1, such as 0.4 (the share of weights that may stay)",
}


@dataclass(frozen=True)
class Request:
    """A budget, and what to do with it. Raises UsageError for a budget that asks for nothing or cannot be."""

    budget: Budget
    amount: float
    tokens: int = 128
    """A run is of so many tokens; of no matter to a budget of density."""
    mode: Mode = "ours"
    objective: Objective = "retained"
    uniform: bool = False
    """One pattern for all sites."""
    candidates: tuple[str, ...] = CANDIDATES
    diversity: Diversity = "counted"
    """The formula of mode paper."""
    values: Values = "fp32"

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.budget, BUDGETS, "budget"),
            (self.mode, MODES, "mode"),
            (self.objective, OBJECTIVES, "objective"),
            (self.diversity, get_args(Diversity), "diversity"),
            (self.values, get_args(Values), "values"),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r}: expected {' or '.join(known)}")
        least = {"speedup": 1.0, "latency": 0.0, "density": 0.0}[self.budget]
        most = 1.0 if self.budget == "density" else math.inf
        if not least < self.amount < most:
            raise UsageError(f"{self.budget} {self.amount:g}: expected {_ASKED[self.budget]}")
        if self.tokens < 1:
            raise UsageError(f"tokens {self.tokens}: expected a number from 1 up, such as 128")
        if not self.candidates:
            raise UsageError("no candidate was given; expected patterns such as 2:4,64:2:5")
        for text in self.candidates:
            if isinstance(Pattern.parse(text), Dense):
                raise UsageError("candidate dense: every site may stay dense anyway; leave it out")

    @property
    def timed(self) -> bool:
        """Whether the budget is one of time."""
        return self.budget != "density"


def budget_of(
    budget: str | None, speedup: float | None, latency: float | None, density: float | None
) -> tuple[Budget, float]:
    """What --budget NAME=AMOUNT, --speedup, --latency or --density say: one of them."""
    given = {"speedup": speedup, "latency": latency, "density": density}
    asked: list[tuple[str, Any]] = [(name, amount) for name, amount in given.items() if amount is not None]
    if budget is not None:
        name, equals, amount = budget.partition("=")
        asked += [(name, amount)] if equals else []
        asked = asked if equals else [one for one in asked if one[0] == name]
    if len(asked) != 1 or asked[0][0] not in given:
        raise UsageError(
            f"expected one budget: --speedup 1.5, --latency 12.5 (ms), --density 0.4, or --budget density=0.4; found "
            f"{', '.join(f'{name} {amount}' for name, amount in asked) or budget or 'none'}"
        )
    try:
        return cast(Budget, asked[0][0]), float(asked[0][1])
    except ValueError:
        raise UsageError(
            f"--budget {budget!r}: {asked[0][1]!r} is no number; expected one such as density=0.4"
        ) from None
