"""What a bias model says of labelled rows: log-probabilities of classes, for the losses of `debiasing`.

They come from columns of the data, or from a model of word overlap that is fitted to the rows (see `overlap`).

1. Columns are one `bias`, a list of a number for each class in the order of the classes (in a .csv or .tsv as JSON), or
   one for each class, `bias_entailment`, by the class's name in any case, else by its number.
2. Every row has finite log-probabilities, whose exponentials add up to 1 within .001; they are then divided by it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparsec.errors import UsageError
from sparsec.tables import Row, Table
from sparsec.training.labels import Target

BiasSource = Literal["", "columns", "overlap"]
"""Empty: none is read."""
_COLUMN, _SUM_TO_ONE = "bias", 1e-3
_USE = (
    "give a column bias, a list of log-probabilities in the order of the classes, or a column bias_CLASS for each of "
    "them; or for pairs of texts have a model fitted to the overlap of their words: --bias overlap"
)


@dataclass(frozen=True)
class Bias:
    """The bias model of a data set."""

    rows: list[list[float]]
    """Log-probabilities of each row's classes."""
    words: str


def of(source: BiasSource, table: Table, target: Target, texts: Sequence[Row]) -> Bias | None:
    """The bias model that `source` says; None where it says none. Raises UsageError where it cannot be had."""
    if not source:
        return None
    if target.task != "classification":
        raise UsageError(
            f"{table.name}: the labels are scores, and a bias model says how probable classes are; leave out --bias, "
            "and the losses poe, reweight and confreg"
        )
    return _columns(table, target.classes) if source == "columns" else _overlap(table, target, texts)


def refuse(source: BiasSource, name: str, task: str) -> None:
    """Raise UsageError where a bias model is wanted of data without classes of texts."""
    if source:
        raise UsageError(f"{name}: the bias of a {task} cannot be modelled; {_USE}")


def _columns(table: Table, classes: Sequence[str]) -> Bias:
    by_name = {column.lower(): column for column in reversed(table.columns)}
    if _COLUMN in by_name:
        column = by_name[_COLUMN]
        found = [(place, _listed(raw, f"{table.name}, {place}")) for place, (raw,) in table.values([column])]
        words = f"column {column}"
    else:
        chosen = [
            by_name.get(f"{_COLUMN}_{name.lower()}", by_name.get(f"{_COLUMN}_{i}")) for i, name in enumerate(classes)
        ]
        if missing := [name for name, column in zip(classes, chosen, strict=True) if column is None]:
            few = (
                f"no column for the class {missing[0]!r}" if len(missing) < len(classes) else "no bias model's columns"
            )
            raise UsageError(f"{table.name} has {few}; its columns are {table.listed}: {_USE}")
        columns = [column for column in chosen if column is not None]
        found = [(place, list(row)) for place, row in table.values(columns)]
        words = f"columns {', '.join(columns)}"
    return Bias([_checked(row, len(classes), f"{table.name}, {place}") for place, row in found], words)


def _listed(raw: Any, where: str) -> list[Any]:
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: {_COLUMN} is {raw[:40]!r}; expected a list such as [-0.105, -2.303]") from None
    if not isinstance(raw, (list, tuple)):
        raise UsageError(f"{where}: {_COLUMN} is {str(raw)[:40]!r}; expected a list such as [-0.105, -2.303]")
    return list(raw)


def _checked(raw: Sequence[Any], classes: int, where: str) -> list[float]:
    """Rule 2."""
    shown = ", ".join(str(one)[:12] for one in raw[:4]) + (", ..." if len(raw) > 4 else "")
    if len(raw) != classes:
        raise UsageError(
            f"{where}: the bias model gives {len(raw)} numbers ({shown}), the labels have {classes} classes"
        )
    try:
        row = [float(one) for one in raw]
    except (TypeError, ValueError):
        row = [math.nan]
    total = math.fsum(math.exp(min(one, 1.0)) for one in row)  # above 0 it is wrong already, and may not overflow
    if not all(map(math.isfinite, row)) or abs(total - 1) > _SUM_TO_ONE:
        raise UsageError(
            f"{where}: the bias model gives {shown}; expected finite log-probabilities, whose exponentials add up to "
            "1: give log_softmax of its logits, or the logarithm of probabilities none of which is 0"
        )
    return [one - math.log(total) for one in row]


def _overlap(table: Table, target: Target, texts: Sequence[Row]) -> Bias:
    from sparsec.training import overlap

    if any(len(parts) != 2 or not all(isinstance(part, str) for part in parts) for _, parts in texts):
        raise UsageError(
            f"{table.name}: found no pairs of texts, so there is no overlap of words to learn a bias from; name both "
            "columns with --text-columns a,b, or give a bias model's own answers as columns, --bias columns"
        )
    labels = [int(label) for label in target.values]
    found = overlap.log_probabilities([parts for _, parts in texts], labels, len(target.classes))
    right = float((found.argmax(1) == labels).mean())
    most = max(map(labels.count, range(len(target.classes)))) / len(labels)
    words = f"overlap of words, right on {right:.3f} of the labels (the most frequent one: {most:.3f})"
    return Bias(found.tolist(), words)
