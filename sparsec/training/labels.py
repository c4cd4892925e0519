"""Labels of a data set, of whatever kind they are, to numbers: of classes, or scores.

1. Numbers are labels as they stand or as text. Where all are whole they mean classes, else scores.
2. Classes that nobody named are sorted, numbers by size: 0 to k-1 stay what they are.
3. Where classes are given, a label is the name of one, in any case if that is clear; or else its number, but not where
   their names are numbers themselves. All labels are read in the same one of the two ways.
4. No row is left out: a label that is missing, or hidden as -1, is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsec.errors import UsageError

Task = Literal["classification", "regression", "lm", "none"]
"""What is learnt: a class, a score, the next token, or (none) only what a teacher gives."""
Label = int | float | str
_MOST = 1000  # classes; with more it is rather a column of text
_NUMBER = re.compile(r"[+-]?(\d{1,18}\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NAME = "name the right column with --label-column"


@dataclass(frozen=True)
class Target:
    """What the labels of a data set are."""

    task: Task
    values: list[int] | list[float]
    classes: tuple[str, ...]
    """Names in the order of their numbers; none where the labels are scores."""


@dataclass(frozen=True)
class Labels:
    """A column of labels as it was read."""

    where: str
    """`train.tsv, column label`."""
    places: Sequence[str]
    """Where each row stands, such as `line 3`."""
    found: Sequence[Any]
    names: tuple[str, ...] = ()
    """What its numbers stand for, where the data set says so."""

    def target(self, task: Task | None = None, classes: Sequence[str] = ()) -> Target:
        """As numbers. `task` None: what they look like. `classes`: the only ones there may be.

        Raises UsageError that names the place, the label and the classes.
        """
        labels = self._read()
        if task is None:
            scores = any(isinstance(label, float) for label in labels)
            task = "regression" if scores and not self.names and not classes else "classification"
        if set(labels) == {-1} or (task == "classification" and -1 in labels and (self.names or 0 in labels)):
            raise self._error(
                labels.index(-1), "found the label -1, which hides it in test data; take a split whose labels are known"
            )
        if task == "regression":
            return Target(task, self._scores(labels), ())
        whole = self._whole(labels)
        if classes:
            return Target(task, self._among(whole, classes), tuple(classes))
        made = self.names or self._classes(whole)
        if len(set(whole)) < 2:
            raise UsageError(
                f"{self.where}: found only the label {self._text(whole[0])!r} in {len(whole)} rows, expected two "
                f"classes at least; {_NAME}, or other data"
            )
        return Target(task, self._among(whole, made), made)

    def _read(self) -> list[Label]:
        """Rules 1 and 4: all numbers, or all text."""
        if missing := [i for i, raw in enumerate(self.found) if _is_missing(raw)]:
            raise self._error(
                missing[0],
                f"found no label, as in {len(missing)} of {len(self.found)} rows; fill them in, or remove them",
            )
        for i, raw in enumerate(self.found):
            if not isinstance(raw, (int, float, str)):
                raise self._error(i, f"found {str(raw)[:40]}, expected one number or class a row; {_NAME}")
        numbers = [_number(raw) for raw in self.found]
        kept = [number for number in numbers if number is not None]
        if len(kept) == len(numbers):
            return [*kept]
        if any(number % 1 for number in kept):
            at = numbers.index(None)
            raise self._error(at, f"found {str(self.found[at])[:40]!r} among scores, expected a number; correct it")
        return [str(raw).strip() for raw in self.found]

    def _scores(self, labels: Sequence[Label]) -> list[float]:
        for i, label in enumerate(labels):
            if not (_is_number(label) if isinstance(label, str) else math.isfinite(label)):
                raise self._error(i, f"found {str(label)[:40]!r}, expected a number (--task regression); {_NAME}")
        return [float(label) for label in labels]

    def _whole(self, labels: Sequence[Label]) -> list[int | str]:
        whole: list[int | str] = []
        for i, label in enumerate(labels):
            if isinstance(label, float) and (label % 1 or math.isinf(label)):
                raise self._error(i, f"found {label}, expected a class; for scores say --task regression")
            if self.names and not (isinstance(label, (int, float)) and 0 <= label < len(self.names)):
                raise self._error(i, f"found the label {label}; the data set names {len(self.names)} classes, from 0")
            whole.append(int(label) if isinstance(label, float) else label)
        return whole

    def _classes(self, labels: Sequence[int | str]) -> tuple[str, ...]:
        """Rule 2."""
        numbers = [label for label in labels if isinstance(label, int)]
        made = [str(one) for one in sorted(set(numbers))] if numbers else sorted({str(label) for label in labels})
        if len(made) > _MOST:
            raise UsageError(
                f"{self.where}: found {len(made)} different labels, expected at most {_MOST} classes; {_NAME}, or for "
                "scores say --task regression"
            )
        return tuple(made)

    def _among(self, labels: Sequence[int | str], classes: Sequence[str]) -> list[int]:
        """Rule 3."""
        unique = len({one.casefold() for one in classes}) == len(classes)
        fold: Callable[[str], str] = str.casefold if unique else str
        number = {fold(one): i for i, one in enumerate(classes)}
        texts = [fold(self._text(label)) for label in labels]
        if not any(fold(one) in number for one in (*self.names, *texts)) and not any(
            _is_number(one) for one in classes
        ):
            found = [label if isinstance(label, int) and 0 <= label < len(classes) else None for label in labels]
        else:
            found = [number.get(text) for text in texts]
        if None in found:
            at = found.index(None)
            raise self._error(
                at,
                f"found the label {self._text(labels[at])[:40]!r}, expected one of the {len(classes)} classes "
                f"{_listed(classes)}; correct it, or {_NAME}",
            )
        return [one for one in found if one is not None]

    def _text(self, label: int | str) -> str:
        return self.names[label] if self.names and isinstance(label, int) else str(label)

    def _error(self, at: int, words: str) -> UsageError:
        return UsageError(f"{self.where}, {self.places[at]}: {words}")


def _is_missing(raw: Any) -> bool:
    if isinstance(raw, str):
        return raw.strip() in ("", "-")  # the last is how SNLI marks a pair without a verdict
    return raw is None or (isinstance(raw, float) and math.isnan(raw))


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _number(raw: int | float | str) -> int | float | None:
    if not isinstance(raw, str):
        return int(raw) if isinstance(raw, bool) else raw
    if not _is_number(raw):
        return None
    return float(raw) if set(raw) & set(".eE") else int(raw)


def _listed(classes: Sequence[str]) -> str:
    return ", ".join(repr(one[:40]) for one in classes[:20]) + (", ..." if len(classes) > 20 else "")
