"""Read the DATA of a command: what it holds, as text, token ids or pictures, before any model sees it.

DATA is empty (docstrings of the Python standard library), a .txt, .csv, .tsv, .jsonl or .parquet file, a folder of
pictures or of a data set, or the name of a hub data set with its configuration (`glue/sst2`).
"""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import text
from sparsec.errors import UsageError

if TYPE_CHECKING:
    import random

GIVEN = "given:"
"""Begins the DATA of a recipe whose batches were given in Python; the SHA-256 of their content follows."""
KINDS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
IDS = "input_ids"
_SINGLE = ("text", "sentence", "content", "document", "article", "review", "prompt")
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 string", "#2 string"),
)
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+){0,2}")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_PIECE = 8  # characters of consecutive text for each token of a sample: a sample is mostly one piece of text
Row = tuple[str, Any]
"""Where it stands, such as `line 3`, and what: one or two texts, or token ids."""


@dataclass(frozen=True)
class Source:
    """What DATA holds. Every kind has a fixed order; `documents` come in the order of the generator that was given."""

    kind: Literal["documents", "texts", "ids", "pictures"]
    """Documents are cut into samples of full length; a row of texts or ids is a sample."""
    items: Iterable[Any]
    """Documents: str. Texts and ids: Row. Pictures: Path."""
    words: str


def check(source: str) -> None:
    """Raise UsageError for DATA that cannot be read, as far as that is known without reading it."""
    path = Path(source)
    if not source or source.startswith(GIVEN) or path.is_dir():
        return
    if path.exists():
        if path.suffix.lower() not in KINDS:
            raise UsageError(
                f"DATA {source}: a file of kind {path.suffix or '(no ending)'!r} cannot be read; expected "
                f"{', '.join(KINDS)}, a folder of pictures, or a hub data set such as glue/sst2"
            )
    elif path.suffix.lower() in KINDS or not _HUB_ID.fullmatch(source):
        raise UsageError(f"DATA {source}: there is no such file or folder; expected a path, or a hub data set's name")


def read(source: str, columns: Sequence[str], length: int, order: random.Random) -> Source:
    """What `source` holds. `columns`: one text column, or two for pairs of texts; none: the usual names are looked for.

    `length`: tokens of a sample; `order` puts documents in order. Raises UsageError naming file, line and columns.
    """
    check(source)
    if source.startswith(GIVEN):
        raise UsageError(
            "the recipe's calibration batches were given in Python and are not kept in it; give the same ones again "
            "with calibration=..., or name other data with --calib"
        )
    if len(columns) > 2:
        raise UsageError(f"--text-columns {','.join(columns)}: expected one column, or two for pairs of texts")
    if not source:
        return Source("documents", text.docstrings(order), "docstrings of the Python standard library")
    path = Path(source)
    if path.is_dir():
        files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in PICTURES)
        if pictures := list(files):
            return Source("pictures", pictures, path.name)
        return _table(*_dataset(str(path)), columns, path.name)
    if not path.exists():
        return _table(*_dataset(source), columns, source)
    if path.suffix.lower() == ".parquet":
        return _table(*_parquet(path), columns, path.name)
    content = _text_of(path)
    if path.suffix.lower() == ".txt":
        pieces = _pieces(content, length * _PIECE)
        order.shuffle(pieces)
        return Source("documents", pieces, path.name)
    if path.suffix.lower() == ".jsonl":
        return _jsonl(content, columns, path.name)
    return _delimited(content, columns, path.name, tabs=path.suffix.lower() == ".tsv")


def _text_of(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path.name} is no UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise UsageError(f"{path.name} is empty; expected text")
    return content


def _pieces(content: str, characters: int) -> list[str]:
    """The paragraphs, or else the lines, joined to pieces of at least so many characters."""
    parts, mark = _PARAGRAPHS.split(content), "\n\n"
    if len(parts) == 1:
        parts, mark = content.splitlines(), "\n"
    pieces: list[str] = []
    current, size = [], 0
    for part in parts:
        current.append(part)
        size += len(part)
        if size >= characters:
            pieces.append(mark.join(current))
            current, size = [], 0
    return [*pieces, mark.join(current)] if size else pieces


def _delimited(content: str, wanted: Sequence[str], name: str, tabs: bool) -> Source:
    """Rows of a .csv or .tsv file. Columns that are called by number (the first is 0) mean that it has no header."""
    if tabs:  # quotes are text there, and often unbalanced
        reader = csv.reader(io.StringIO(content), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(io.StringIO(content))
    try:
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: {error}; expected comma-separated text") from error
    first = rows[0][1]
    header = [cell.strip() for cell in first]
    if wanted and all(column.isdigit() for column in wanted):
        chosen, header = tuple(wanted), [str(i) for i in range(len(first))]
        _known(chosen, header, name)
    elif not wanted and len(header) == 1 and header[0].lower() not in _SINGLE:
        chosen, header = ("0",), ["0"]
    else:
        numbers = " (a file without header: give the columns' numbers, the first is 0)"
        chosen, rows = _choose(header, wanted, name, numbers), rows[1:]
    places = [header.index(column) for column in chosen]

    def texts() -> Iterator[Row]:
        for line, row in rows:
            if len(row) <= max(places):
                raise UsageError(
                    f"{name}, line {line}: found {len(row)} columns, expected at least {max(places) + 1}; correct it"
                )
            yield f"line {line}", tuple(row[place] for place in places)

    return Source("texts", list(texts()), _column_words(name, chosen if header != ["0"] else ()))


def _jsonl(content: str, wanted: Sequence[str], name: str) -> Source:
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

    return _table(list(rows[0][1]), values, wanted, name)


def _parquet(path: Path) -> tuple[list[str], Callable[[Sequence[str]], Iterator[Row]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(f"{path.name}: reading parquet needs more: pip install 'sparsec[train]' ({error})") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path.name} is no parquet file that can be read: {_line_of(error)}") from error
    return table.column_names, functools.partial(_rows_of, table.to_pydict())


def _dataset(name: str) -> tuple[list[str], Callable[[Sequence[str]], Iterator[Row]]]:
    """A data set of the hub, of its cache, or of a folder: its training split, or else its first."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"DATA {name} is no file or folder of pictures; data sets need: pip install 'sparsec[train]' ({error})"
        ) from None
    datasets.disable_progress_bars()
    owner, _, config = name.rpartition("/")
    tries: list[tuple[str, ...]] = [(name,)] if "/" not in owner or Path(name).exists() else []
    if owner and not Path(name).exists():
        tries.append((owner, config))  # a/b may be owner/name or name/config
    reasons = []
    for arguments in tries:
        try:
            found = datasets.load_dataset(*arguments)
        except Exception as error:  # whatever network, cache, builders and their file readers raise
            reasons.append(_line_of(error))
            continue
        split = "train" if "train" in found else next(iter(found))
        return found[split].column_names, functools.partial(_rows_of, found[split])
    raise UsageError(
        f"DATA {name}: no data set of this name could be loaded ({'; '.join(dict.fromkeys(reasons))}). Without a "
        "network only what the hub's cache holds is there; a local .txt, .csv, .tsv, .jsonl or .parquet file needs none"
    )


def _rows_of(table: Any, columns: Sequence[str]) -> Iterator[Row]:
    return ((f"row {i}", values) for i, values in enumerate(zip(*(table[name] for name in columns), strict=True)))


def _table(
    found: list[str], values: Callable[[Sequence[str]], Iterator[Row]], wanted: Sequence[str], name: str
) -> Source:
    """Texts, or token ids, of a table that has the columns `found`."""
    if not wanted and IDS in found:
        return Source("ids", [(place, _checked_ids(ids, name, place)) for place, (ids,) in values([IDS])], name)
    chosen = _choose(found, wanted, name)
    rows = []
    for place, row in values(chosen):
        for column, value in zip(chosen, row, strict=True):
            if value is not None and not isinstance(value, str):
                raise UsageError(
                    f"{name}, {place}: {column} is {str(value)[:40]!r}; expected text (token ids belong in {IDS})"
                )
        rows.append((place, tuple(value or "" for value in row)))
    return Source("texts", rows, _column_words(name, chosen))


def _checked_ids(ids: Any, name: str, place: str) -> list[int]:
    if isinstance(ids, list) and ids and all(type(one) is int and one >= 0 for one in ids):
        return ids
    raise UsageError(f"{name}, {place}: {IDS} is {str(ids)[:40]}; expected a list of token ids, numbers from 0")


def _choose(found: Sequence[str], wanted: Sequence[str], name: str, hint: str = "") -> tuple[str, ...]:
    if wanted:
        _known(wanted, found, name, hint)
        return tuple(wanted)
    by_name = {column.lower(): column for column in reversed(found)}
    for usual in (*((one,) for one in _SINGLE), *_PAIRS):
        if all(column in by_name for column in usual):
            return tuple(by_name[column] for column in usual)
    if len(found) == 1:
        return (found[0],)
    raise UsageError(
        f"{name}: which column holds the text? Expected text, sentence or another usual name; its columns are "
        f"{_listed(found)}; say which with --text-columns{hint}"
    )


def _known(wanted: Sequence[str], found: Sequence[str], name: str, hint: str = "") -> None:
    for column in wanted:
        if column not in found:
            raise UsageError(
                f"{name} has no column {column!r} (--text-columns); its columns are {_listed(found)}{hint}"
            )


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(repr(column[:40]) for column in columns[:20]) + (", ..." if len(columns) > 20 else "")


def _column_words(name: str, columns: Sequence[str]) -> str:
    return f"{name} ({' and '.join(columns)})" if columns else name


def _line_of(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
