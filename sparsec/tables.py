"""Tables: the rows and named columns of a .csv, .tsv, .jsonl or .parquet file, or of a data set."""

from __future__ import annotations

import csv
import functools
import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsec.errors import UsageError

ANY = "*"
"""Among the splits to look for: whichever comes first."""
Row = tuple[str, Any]
"""Where it stands, such as `line 3`, and what."""
Values = Callable[[Sequence[str]], Iterator[Row]]
"""For columns: the tuple of their values, row by row."""


@dataclass(frozen=True)
class Table:
    """Rows whose columns have names."""

    name: str
    columns: Sequence[str]
    values: Values
    header: bool = True
    """False: the columns are called by number, the first is 0."""
    hint: str = ""
    """Ends what an error says about columns."""
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column of numbers -> the names that these stand for, where the table knows them."""

    def check(self, wanted: Sequence[str], option: str) -> None:
        """Raise UsageError unless it has these columns, which `option` asks for."""
        for column in wanted:
            if column not in self.columns:
                raise UsageError(
                    f"{self.name} has no column {column!r} ({option}); its columns are {self.listed}{self.hint}"
                )

    @property
    def listed(self) -> str:
        """Its columns, for errors."""
        more = ", ..." if len(self.columns) > 20 else ""
        return ", ".join(repr(column[:40]) for column in self.columns[:20]) + more


def text_of(path: Path) -> str:
    """The content of a text file that is not empty."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{path.name} is empty; expected text")
    return content


def delimited(content: str, wanted: Sequence[str], name: str, tabs: bool, heads: Collection[str]) -> Table:
    """A .csv or .tsv file. `wanted` columns that are called by number, the first is 0, mean that it has no header.

    Where none are wanted, a single column has a header only if that is one of `heads`.
    """
    if tabs:  # quotes are text there, and often unbalanced
        reader = csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(content))
    try:
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: {error}; expected comma-separated text") from error
    first = rows[0][1]
    columns = [cell.strip() for cell in first]
    alone = not wanted and len(columns) == 1 and columns[0].lower() not in heads
    header = not alone and not (wanted and all(column.isdigit() for column in wanted))
    if header:
        rows = rows[1:]
    else:
        columns = [str(i) for i in range(len(first))]

    def values(chosen: Sequence[str]) -> Iterator[Row]:
        places = [columns.index(column) for column in chosen]
        for line, row in rows:
            if len(row) <= max(places):
                raise UsageError(
                    f"{name}, line {line}: found {len(row)} columns, expected at least {max(places) + 1}; correct it"
                )
            yield f"line {line}", tuple(row[place] for place in places)

    hint = " (a file without header: give the columns' numbers, the first is 0)" if header else ""
    return Table(name, columns, values, header, hint)


def jsonl(content: str, name: str) -> Table:
    """A file with one JSON object a line; the first names the columns."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise UsageError(f"{name}, line {number} is no JSON: {reason}; expected one object a line") from error
        if not isinstance(row, dict):
            raise UsageError(f'{name}, line {number}: expected an object such as {{"text": ...}}, found {line[:40]!r}')
        rows.append((f"line {number}", row))

    def values(columns: Sequence[str]) -> Iterator[Row]:
        for place, row in rows:
            if missing := [column for column in columns if column not in row]:
                raise UsageError(f"{name}, {place}: there is no {missing[0]!r}; it has {', '.join(row) or 'no keys'}")
            yield place, tuple(row[column] for column in columns)

    return Table(name, list(rows[0][1]), values)


def parquet(path: Path) -> Table:
    """A .parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path.name}: reading parquet needs more: pip install 'sparsec[train]' ({error})") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path.name} is no parquet file that can be read: {_line_of(error)}") from error
    return Table(path.name, table.column_names, functools.partial(_rows_of, table.to_pydict()))


def dataset(source: str, name: str, splits: Sequence[str]) -> Table:
    """A data set of the hub, of its cache, or of a folder: the first of `splits` that it has.

    A folder that the data set was saved to as a whole, without splits, is taken for whichever is wanted.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"DATA {source} is no file or folder of pictures; data sets need: pip install 'sparsec[train]' ({error})"
        ) from None
    datasets.disable_progress_bars()
    found, path = _loaded(datasets, source), Path(source)
    if isinstance(found, dict):
        split = next((split for split in splits if split in found), next(iter(found)) if ANY in splits else None)
        if split is None:
            other = "name one of its files" if path.exists() else "name other data"
            raise UsageError(
                f"DATA {source}: found the splits {', '.join(found)}, expected {' or '.join(splits)}; {other}"
            )
        found = found[split]
    names = {key: kind.names for key, kind in (found.features or {}).items() if isinstance(kind, datasets.ClassLabel)}
    return Table(name, found.column_names, functools.partial(_rows_of, found), classes=names)


def _loaded(datasets: Any, source: str) -> Any:
    path = Path(source)
    owner, _, config = source.rpartition("/")
    tries: list[tuple[str, ...]] = [(source,)] if "/" not in owner or path.exists() else []
    if owner and not path.exists():
        tries.append((owner, config))  # a/b may be owner/name or name/config
    saved = any((path / file).is_file() for file in ("dataset_dict.json", "state.json"))
    reasons = []
    for arguments in tries:
        try:
            return datasets.load_from_disk(source) if saved else datasets.load_dataset(*arguments)
        except Exception as error:  # whatever network, cache, builders and their file readers raise
            reasons.append(_line_of(error))
    raise UsageError(
        f"DATA {source}: no data set of this name could be loaded ({'; '.join(dict.fromkeys(reasons))}). Without a "
        "network only what the hub's cache holds is there; a local .txt, .csv, .tsv, .jsonl or .parquet file needs none"
    )


def _rows_of(table: Any, columns: Sequence[str]) -> Iterator[Row]:
    return ((f"row {i}", values) for i, values in enumerate(zip(*(table[name] for name in columns), strict=True)))


def _line_of(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
