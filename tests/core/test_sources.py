"""DATA: every kind is read, and what cannot be read is refused with file, line and columns."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsec import sources
from sparsec.errors import UsageError


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(source: str, *columns: str, content: str | None = None, length: int = 4) -> sources.Source:
    if content is not None:
        Path(source).write_text(content)
    return sources.read(source, columns, length, random.Random(0))


def texts(source: sources.Source) -> list[Any]:
    return [value for _, value in source.items]


def refused(source: str, *columns: str, content: str | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        read(source, *columns, content=content)
    assert 2 == caught.value.exit_code
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "columns", "expected"),
    [
        ("a.csv", 'label,text\n1,"one, ""two"""\n', (), [('one, "two"',)]),
        ("a.csv", "label,Sentence\n1,one\n", (), [("one",)]),
        ("a.csv", "first,second\none,two\n", ("second", "first"), [("two", "one")]),
        ("a.csv", "one\ntwo\n", (), [("one",), ("two",)]),
        ("a.csv", "1,one\n2,two\n", ("1",), [("one",), ("two",)]),
        ("a.tsv", 'sentence\tlabel\nit "is\t1\nso"\t0\n', (), [('it "is',), ('so"',)]),
        ("a.tsv", "\ufeffquestion1\tquestion2\none\ttwo\n", (), [("one", "two")]),
        ("a.tsv", "question\tsentence\none\ttwo\n", (), [("one", "two")]),
        ("a.tsv", "sentence_A\tsentence_B\none\ttwo\n", (), [("one", "two")]),
        ("a.txt", "id\tbody\n1\tone\n", ("body",), [("one",)]),
        ("a.jsonl", '{"id": 1, "text": "one"}\n\n{"id": 2, "text": "two"}\n', (), [("one",), ("two",)]),
        ("a.jsonl", '{"anything": "one"}\n{"anything": null}\n', (), [("one",), ("",)]),
        ("a.jsonl", '{"input_ids": [1], "text": "one"}\n', ("text",), [("one",)]),
    ],
)
def test_rows_of_text(file: str, content: str, columns: tuple[str, ...], expected: list[Any]) -> None:
    found = read(file, *columns, content=content)

    assert "texts" == found.kind
    assert expected == texts(found)


def test_token_ids_are_taken_before_text() -> None:
    found = read("a.jsonl", content='{"text": "one", "input_ids": [1, 2]}\n{"text": "", "input_ids": [3]}\n')

    assert "ids" == found.kind
    assert [[1, 2], [3]] == texts(found)


def test_pieces_of_a_text_are_consecutive_and_complete() -> None:
    lines = [f"line {i}" for i in range(100)]

    pieces = list(read("a.txt", content="\n".join(lines)).items)

    assert sorted(lines) == sorted(line for piece in pieces for line in piece.split("\n"))
    assert 1 >= sum(len(piece) < 32 for piece in pieces)  # what is left at the end
    assert 1 < len(pieces) < 100


def test_paragraphs_stay_whole() -> None:
    pieces = list(read("a.txt", content="\n\n".join("some words\nof a paragraph" for _ in range(9))).items)

    assert all(not part.startswith("of") for piece in pieces for part in piece.split("\n\n"))


@pytest.mark.parametrize(
    ("file", "content", "columns", "said"),
    [
        ("a.json", "{}", (), "'.json' cannot be read; expected .txt"),
        ("a.txt", " \n", (), "a.txt is empty"),
        ("a.csv", "", (), "a.csv is empty"),
        ("a.csv", "id,label\n1,2\n", (), "its columns are 'id', 'label'; say which with --text-columns"),
        ("a.csv", "id,text\n1,2\n", ("body",), "no column 'body' (--text-columns); its columns are 'id', 'text'"),
        ("a.csv", "id,text\n1,2\n", ("7",), "no column '7'"),
        ("a.csv", "id,text\n1,one\n2\n", (), "a.csv, line 3: found 1 columns, expected at least 2"),
        ("a.csv", "a,b,c\n", ("a", "b", "c"), "expected one column, or two"),
        ("a.jsonl", '{"text": "one"}\n{"text": \n', (), "a.jsonl, line 2 is no JSON"),
        ("a.jsonl", '{"text": "one"}\n["one"]\n', (), "a.jsonl, line 2: expected an object"),
        ("a.jsonl", '{"text": "one"}\n{"tekst": "one"}\n', (), "a.jsonl, line 2: there is no 'text'; it has tekst"),
        ("a.jsonl", '{"text": "one"}\n{"text": 3}\n', (), "a.jsonl, line 2: text is '3'; expected text"),
        ("a.jsonl", '{"a": "one", "b": "two"}\n', (), "its columns are 'a', 'b'"),
        ("a.jsonl", '{"input_ids": [1]}\n{"input_ids": []}\n', (), "line 2: input_ids is []"),
        ("a.jsonl", '{"input_ids": [1, -1]}\n', (), "line 1: input_ids is [1, -1]"),
        ("a.jsonl", '{"input_ids": [1.0, true]}\n', (), "expected a list of token ids"),
        ("a.jsonl", "[" * 100_000, (), "line 1 is no JSON"),
    ],
)
def test_what_cannot_be_read(file: str, content: str, columns: tuple[str, ...], said: str) -> None:
    assert said in refused(file, *columns, content=content)


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "a/b/c/d", "-x", "/missing/x.txt"])
def test_a_missing_file_is_refused_before_anything_is_loaded(source: str) -> None:
    with pytest.raises(UsageError, match="there is no such file or folder"):
        sources.check(source)


@pytest.mark.parametrize("source", ["", "glue/sst2", "wikitext", "org/wikitext/wikitext-2-raw-v1", "given:0123"])
def test_what_may_be_read_passes_the_first_check(source: str) -> None:
    sources.check(source)


def test_text_that_is_not_utf8() -> None:
    Path("a.txt").write_bytes(b"caf\xe9")

    assert "a.txt is no UTF-8 text (byte 3)" in refused("a.txt")


def test_batches_of_python_are_not_in_a_recipe() -> None:
    assert "give the same ones again with calibration=" in refused("given:0123")


def test_parquet() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the train extra (datasets) brings pyarrow")
    import pyarrow.parquet as parquet

    parquet.write_table(pyarrow.table({"label": [1, 2], "text": ["one", None]}), "a.parquet")
    parquet.write_table(pyarrow.table({"input_ids": [[1, 2], [3]]}), "b.parquet")
    Path("c.parquet").write_text("no parquet")

    assert [("one",), ("",)] == texts(read("a.parquet"))
    assert [[1, 2], [3]] == texts(read("b.parquet"))
    assert "c.parquet is no parquet file" in refused("c.parquet")


@pytest.mark.parametrize("source", ["a.parquet", "glue/sst2"])
def test_without_the_train_extra_it_is_named(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    Path("a.parquet").write_text("")

    assert "pip install 'sparsec[train]'" in refused(source)


def test_data_sets_of_a_folder_and_a_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the train extra is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("folder").mkdir()
    Path("folder/train.jsonl").write_text('{"label": 0, "sentence": "one"}\n{"label": 1, "sentence": "two"}\n')
    Path("folder/test.jsonl").write_text('{"label": 0, "sentence": "three"}\n')

    assert [("one",), ("two",)] == texts(read("folder"))
    assert "no data set of this name could be loaded" in refused("no-such-owner/no-such-data")


def test_a_data_set_that_was_saved_as_a_whole() -> None:
    datasets = pytest.importorskip("datasets", reason="the train extra (datasets) brings it")
    made = datasets.Dataset.from_dict({"text": ["one", "two"]})

    made.save_to_disk("plain")
    datasets.DatasetDict({"test": made}).save_to_disk("split")

    assert [("one",), ("two",)] == texts(read("plain")) == texts(read("split"))
