"""Read the DATA of a command: what it holds, as text, token ids or pictures, before any model sees it.

DATA is empty (docstrings of the Python standard library), a .txt, .csv, .tsv, .jsonl or .parquet file, a folder of
pictures or of a data set, or the name of a hub data set with its configuration (`glue/sst2`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import tables, text
from sparsec.errors import UsageError
from sparsec.tables import ANY, Row, Table

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
    ("sentence_a", "sentence_b"),
)
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+){0,2}")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_PIECE = 8  # characters of consecutive text for each token of a sample: a sample is mostly one piece of text


@dataclass(frozen=True)
class Source:
    """What DATA holds. Every kind has a fixed order; `documents` come in the order of the generator that was given."""

    kind: Literal["documents", "texts", "ids", "pictures"]
    """Documents are cut into samples of full length; a row of texts or ids is a sample."""
    items: Iterable[Any]
    """Documents: str. Texts and ids: Row, of one or two texts, or of token ids. Pictures: Path."""
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
    if not source:
        return Source("documents", text.docstrings(order), "docstrings of the Python standard library")
    path = Path(source)
    if found := pictures(path):
        return Source("pictures", found, path.name)
    if is_prose(path, columns):
        parts = pieces(path, length)
        order.shuffle(parts)
        return Source("documents", parts, path.name)
    table = table_of(source, columns)
    if not columns and IDS in table.columns:
        return Source("ids", id_rows(table), table.name)
    chosen = text_columns(table, columns)
    return Source("texts", text_rows(table, chosen), words_of(table, chosen))


def pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and the folders in it; none for what is no folder."""
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICTURES] if folder.is_dir() else []


def is_prose(path: Path, columns: Sequence[str]) -> bool:
    """Whether a file is text as a whole: a .txt, but where columns are asked for, then it is a table with tabs."""
    return path.suffix.lower() == ".txt" and path.is_file() and not columns


def table_of(source: str, wanted: Sequence[str], splits: Sequence[str] = ("train", ANY)) -> Table:
    """The table that a file or data set is. `wanted`: columns to be read, of a data set's first of `splits`."""
    path = Path(source)
    if not path.is_file():
        return tables.dataset(source, path.name if path.is_dir() else source, splits)
    kind = path.suffix.lower()
    if kind == ".parquet":
        return tables.parquet(path)
    content = tables.text_of(path)
    if kind == ".jsonl":
        return tables.jsonl(content, path.name)
    return tables.delimited(content, wanted, path.name, kind != ".csv", _SINGLE)


def pieces(path: Path, length: int) -> list[str]:
    """The paragraphs, or else the lines, of a text file, joined to pieces of at least about `length` tokens."""
    content = tables.text_of(path)
    parts, mark = _PARAGRAPHS.split(content), "\n\n"
    if len(parts) == 1:
        parts, mark = content.splitlines(), "\n"
    found: list[str] = []
    current, size = [], 0
    for part in parts:
        current.append(part)
        size += len(part)
        if size >= length * _PIECE:
            found.append(mark.join(current))
            current, size = [], 0
    return [*found, mark.join(current)] if size else found


def text_rows(table: Table, columns: Sequence[str]) -> list[Row]:
    """The texts of these columns; one that is missing is empty."""
    rows = []
    for place, row in table.values(columns):
        for column, value in zip(columns, row, strict=True):
            if value is not None and not isinstance(value, str):
                raise UsageError(
                    f"{table.name}, {place}: {column} is {str(value)[:40]!r}; expected text (token ids belong in {IDS})"
                )
        rows.append((place, tuple(value or "" for value in row)))
    return rows


def id_rows(table: Table) -> list[Row]:
    """The token ids of its column for them."""
    return [(place, _checked_ids(ids, table.name, place)) for place, (ids,) in table.values([IDS])]


def _checked_ids(ids: Any, name: str, place: str) -> list[int]:
    if isinstance(ids, list) and ids and all(type(one) is int and one >= 0 for one in ids):
        return ids
    raise UsageError(f"{name}, {place}: {IDS} is {str(ids)[:40]}; expected a list of token ids, numbers from 0")


def text_columns(table: Table, wanted: Sequence[str], but: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of one or two texts: `wanted`, or those of usual names, or the only one there is beside `but`."""
    if len(wanted) > 2:
        raise UsageError(f"--text-columns {','.join(wanted)}: expected one column, or two for pairs of texts")
    if wanted:
        table.check(wanted, "--text-columns")
        return tuple(wanted)
    found = [column for column in table.columns if column not in but]
    by_name = {column.lower(): column for column in reversed(found)}
    for usual in (*_PAIRS, *((one,) for one in _SINGLE)):  # pairs first: `question` and `sentence` belong together
        if all(column in by_name for column in usual):
            return tuple(by_name[column] for column in usual)
    if len(found) == 1:
        return (found[0],)
    raise UsageError(
        f"{table.name}: which column holds the text? Expected text, sentence or another usual name; its columns are "
        f"{table.listed}; say which with --text-columns{table.hint}"
    )


def words_of(table: Table, columns: Sequence[str]) -> str:
    """The table's name, and which of its columns were taken where there is a choice."""
    return table.name if not table.header and len(table.columns) == 1 else f"{table.name} ({' and '.join(columns)})"
