"""`--method` and what goes with it: shorthand for a pass that trains, and which of a recipe's passes train."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec import registry
from sparsec.errors import RecipeError, UsageError
from sparsec.recipe import make_pass, name_and_options, parse_passes

if TYPE_CHECKING:
    from sparsec.training.passes import TrainingPass

_OPTION = {"batch_size": "--batch-size"}  # the others are written as the pass's own option is


@dataclass(frozen=True)
class Training:
    """The options that write a training pass, as they were given."""

    method: str | None = None
    """A pass's name, with options of its own in braces where some are wanted: `admm{rho=1e-3}`."""
    epochs: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    teacher: str | None = None

    @property
    def given(self) -> list[str]:
        """The options that are set, as they are written."""
        names = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is not None]
        return [_OPTION.get(name, f"--{name}") for name in names]

    def passes(self, pruning: str | None, task: str) -> str | None:
        """The pass text of these options after what --solver and others say; that alone where nothing is to be trained.

        Raises UsageError for an unknown method, for an option that is given twice, and for a choice of weights before
        a method that chooses them itself.
        """
        if self.method is None:
            if self.given:
                raise UsageError(
                    f"{self.given[0]} goes with --method, which says how to train: {', '.join(names())}; or write a "
                    "pass with --passes: admm{epochs=3, lr=5e-5}"
                )
            return pruning
        name, options = name_and_options(self.method, "method")
        cls = method_class(name)
        asked: dict[str, Any] = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        asked = {key: value for key, value in {**asked, "teacher": self.teacher}.items() if value is not None}
        if twice := next((key for key in asked if key in options), None):
            raise UsageError(
                f"{_OPTION.get(twice, f'--{twice}')} {asked[twice]} and {self.method} both say {twice}; leave one out"
            )
        for key in ("epochs", "lr", "batch_size"):
            if key in asked and not 0 < asked[key] < math.inf:
                raise UsageError(f"{_OPTION.get(key, f'--{key}')} {asked[key]:g}: expected a number above 0")
        if self.teacher is not None:
            options.setdefault("distill", "1")
        if task == "causal-lm":
            options.setdefault("loss", "lm")
        made = str(make_pass(name, {**options, **asked}))
        if pruning is None:
            return made
        if cls.chooses:
            raise UsageError(
                f"--solver, --score and --columns choose weights before any training, and {name} chooses them while it "
                "trains; leave them out, or take --method fixed-mask"
            )
        return f"{pruning.removesuffix(' | freeze')} | {made}"


def names() -> list[str]:
    """The passes that train and can be used here."""
    from sparsec.training.passes import TrainingPass

    found = []
    for name in registry.passes():
        try:
            if issubclass(registry.pass_class(name), TrainingPass):
                found.append(name)
        except RecipeError:  # somebody's pass that cannot be loaded: `sparsec passes` says why
            continue
    return found


def method_class(name: str) -> type[TrainingPass]:
    """The class of a pass that trains. Raises UsageError, which lists them, for any other name."""
    from sparsec.training.passes import TrainingPass

    if name in registry.passes():
        cls = registry.pass_class(name)
        if issubclass(cls, TrainingPass):
            return cls
    what = "is a pass that does not train" if name in registry.passes() else "is unknown"
    raise UsageError(f"--method {name} {what}; the methods are {', '.join(names())}")


def training_passes(text: str) -> list[TrainingPass]:
    """Those of pass text that train, in order."""
    from sparsec.training.passes import TrainingPass

    return [one for one in (parse_passes(text) if text else ()) if isinstance(one, TrainingPass)]
