"""Training data by name: which rows, labels and split of DATA are taken, and the batches that a model gets of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from data_models import LIMIT, WORDS, fixed_program, pixels_program, seq2seq_program, tokenizer, words_program

from sparsec.data import Tools
from sparsec.errors import UsageError
from sparsec.pipeline import Context
from sparsec.program import Program
from sparsec.training.batches import resolve
from sparsec.training.labelled import Labelled, Rows, encode_labelled, read_labelled

SHARED = Path(os.environ.get("SPARSEC_DATA", "../shared/data")).absolute()
PLAIN_ROWS = [("one",), ("two",)], [1, 0]
GLUE_ROWS = [("one two",), ("three",)], [1, 0]
GLUE = "label\tsentence\n1\tone two\n0\tthree\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def program() -> Program:
    return words_program()


@pytest.fixture(scope="module")
def tools() -> Tools:
    return Tools(tokenizer())


def read(source: str, content: str | None = None, **options: Any) -> Rows:
    if content is not None:
        Path(source).write_text(content)
    return read_labelled(source, **options)


def refused(source: str, content: str | None = None, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(source, content, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def texts(rows: Rows) -> list[Any]:
    return [value for _, value in rows.items]


@pytest.mark.parametrize(
    ("file", "content", "options", "expected"),
    [
        ("a.tsv", GLUE, {}, GLUE_ROWS),
        ("a.csv", "y,one\nx,two\n", {"text_columns": ["1"], "label_column": "0"}, PLAIN_ROWS),
        ("a.tsv", "id\t1\t\tone\nid\t0\t\ttwo\n", {"text_columns": ["3"], "label_column": "1"}, PLAIN_ROWS),
        ("a.jsonl", '{"label": "y", "text": "one"}\n{"label": "x", "text": "two"}\n', {}, PLAIN_ROWS),
        ("a.jsonl", '{"intent": 1, "utterance": "one"}\n{"intent": 0, "utterance": "two"}\n', {}, PLAIN_ROWS),
        ("a.txt", "verdict\tbody\n1\tone\n0\ttwo\n", {"text_columns": ["body"], "label_column": "verdict"}, PLAIN_ROWS),
        ("a.txt", "label\ttext\n1\tone\n0\ttwo\n", {"task": "classification"}, PLAIN_ROWS),
        ("a.csv", "stars,text,label\n5,one,1\n1,two,0\n", {"label_column": "stars"}, PLAIN_ROWS),
    ],
)
def test_rows_with_a_class(file: str, content: str, options: dict[str, Any], expected: Any) -> None:
    found = read(file, content, **options)

    assert ("classification", "texts") == (found.task, found.kind)
    assert expected == (texts(found), found.labels)


def test_what_was_taken_is_told(tmp_path: Path) -> None:
    assert f"2 rows of {tmp_path.name}/a.tsv (sentence, label)" == read("a.tsv", GLUE).words


def test_both_kinds_of_labels_of_one_file_are_found_by_the_task() -> None:
    content = (
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        "1\tone\ttwo\t4.5\tNEUTRAL\n2\tthree\tfour\t3\tENTAILMENT\n"
    )

    classes, scores = read("a.tsv", content), read("a.tsv", task="regression")

    assert [("one", "two"), ("three", "four")] == texts(classes) == texts(scores)
    assert ([1, 0], ("ENTAILMENT", "NEUTRAL")) == (classes.labels, classes.classes)
    assert ([4.5, 3.0], ()) == (scores.labels, scores.classes)


def test_token_ids_may_have_labels_or_none() -> None:
    content = (
        '{"input_ids": [3, 4], "attention_mask": [1, 1], "label": 1}\n'
        '{"input_ids": [5], "attention_mask": [1], "label": 0}\n'
    )

    labelled, plain = read("a.jsonl", content), read("b.jsonl", '{"input_ids": [3, 4]}\n')

    assert ("ids", "classification", [[3, 4], [5]], [1, 0]) == (
        labelled.kind, labelled.task, texts(labelled), labelled.labels
    )  # fmt: skip
    assert ("ids", "lm", None) == (plain.kind, plain.task, plain.labels)


@pytest.mark.parametrize(
    ("file", "content", "options", "expected"),
    [
        ("a.txt", "one two\n\nthree\n", {}, [("one two\n\nthree\n",)]),
        ("a.jsonl", '{"text": "one"}\n{"text": "two"}\n', {}, [("one",), ("two",)]),
        ("a.csv", "one\ntwo\n", {}, [("one",), ("two",)]),
        ("a.tsv", GLUE, {"task": "lm"}, [("one two",), ("three",)]),
    ],
)
def test_nothing_but_text_is_for_a_language_model(file: str, content: str, options: Any, expected: Any) -> None:
    found = read(file, content, **options)

    assert ("documents", "lm", None, ()) == (found.kind, found.task, found.labels, found.classes)
    assert expected == texts(found)


def test_with_a_teacher_alone_labels_stay_unread() -> None:
    found = read("a.csv", "id,label,sentence1,sentence2\n1,,one,two\n", task="none")

    assert ("texts", "none", None, [("one", "two")]) == (found.kind, found.task, found.labels, texts(found))


@pytest.mark.parametrize(
    ("content", "options", "said"),
    [
        ("id,text\n1,one\n", {}, "its columns are 'id', 'text'; say which with --label-column"),
        ("id,text\n1,one\n", {"label_column": "y"}, "no column 'y' (--label-column); its columns are 'id', 'text'"),
        ("label,a,b\n1,one,two\n", {}, "which column holds the text?"),
        ("label,text\n", {}, "a.csv is empty; expected rows"),
        ("", {}, "a.csv is empty"),
        ("label,text\n1,one\n,two\n", {}, "a.csv, column label, line 3: found no label"),
        ("label,text\n1,one\n1,two\n", {}, "found only the label '1' in 2 rows"),
        ("label,text\n1,one\n2,two\n", {"classes": ["no", "yes"]}, "line 3: found the label '2', expected one of"),
        ("y,x\n1,one\n", {"label_column": "x", "text_columns": ["x"]}, "holds the labels, so it cannot be the text"),
        ("label,text\n1,one\n", {"label_column": "label", "task": "lm"}, "the task lm reads no labels"),
        ("a,b\n1,one\n", {"text_columns": "ab", "task": "lm"}, "a language model learns from one column"),
        ("1,one\n", {"text_columns": ["1"]}, "its columns are '0', '1'"),
    ],
)
def test_what_cannot_be_read(content: str, options: Any, said: str) -> None:
    assert said in refused("a.csv", content, **options)


@pytest.mark.parametrize("column", ['"attention_mask": [1, 0]', '"token_type_ids": [0, 1]'])
def test_token_ids_with_padding_or_of_pairs_are_refused(column: str) -> None:
    said = refused("a.jsonl", f'{{"input_ids": [3, 4], {column}}}\n')

    assert "line 1: " in said
    assert "give token ids of one text without padding" in said


@pytest.mark.parametrize(
    ("source", "said"),
    [("", "give --eval DATA"), ("given:01", "give the same ones again with resources="), ("x.csv", "no such file")],
)
def test_what_is_no_data(source: str, said: str) -> None:
    assert said in refused(source, split="eval")


# Data sets of the hub, which a folder stands for.


def saved(**splits: dict[str, list[Any]]) -> str:
    datasets = pytest.importorskip("datasets", reason="the train extra brings datasets")
    names = datasets.ClassLabel(names=["negative", "positive"])
    made = {name: datasets.Dataset.from_dict(rows).cast_column("label", names) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk("saved")
    return "saved"


def split(text: str, *labels: int) -> dict[str, list[Any]]:
    return {"idx": list(range(len(labels))), "sentence": [text] * len(labels), "label": list(labels)}


def test_a_data_set_has_splits_and_names_its_classes() -> None:
    source = saved(test=split("t", -1), validation=split("v", 1, 0), train=split("a", 0, 1, 1))

    train, judged = read(source), read(source, split="eval", classes=("negative", "positive"))

    assert ([("a",)] * 3, [0, 1, 1], ("negative", "positive")) == (texts(train), train.labels, train.classes)
    assert "3 rows of saved (sentence, label)" == train.words
    assert ([("v",)] * 2, [1, 0]) == (texts(judged), judged.labels)


def test_a_models_own_order_of_classes_wins() -> None:
    assert [1, 0] == read(saved(train=split("a", 0, 1)), classes=("POSITIVE", "NEGATIVE")).labels


@pytest.mark.parametrize("name", ["validation_matched", "dev", "test"])
def test_other_splits_to_judge_by(name: str) -> None:
    assert [("v",)] * 2 == texts(read(saved(train=split("a", 0, 1), **{name: split("v", 1, 0)}), split="eval"))


def test_hidden_labels_and_missing_splits() -> None:
    hidden = saved(train=split("a", 0, 1), test=split("t", -1, -1))

    assert "row 0: found the label -1, which hides it in test data" in refused(hidden, split="eval")
    only = saved(train=split("a", 0, 1))
    assert "found the splits train, expected validation or validation_matched" in refused(only, split="eval")


def test_a_folder_of_files_is_a_data_set() -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the train extra brings pyarrow")
    import pyarrow.parquet as parquet

    Path("set").mkdir()
    for name, labels in (("train", [0.5, 1.5]), ("validation", [2.5, 3.5])):
        parquet.write_table(pyarrow.table({"text": ["one", "two"], "score": labels}), f"set/{name}.parquet")

    assert ("regression", [0.5, 1.5]) == (read("set").task, read("set").labels)
    assert [2.5, 3.5] == read("set", split="eval").labels == read("set/validation.parquet").labels


def test_a_hub_that_is_not_reached() -> None:
    pytest.importorskip("datasets", reason="the train extra brings datasets")

    said = refused("no-such-owner/no-such-set")

    assert "no data set of this name could be loaded" in said
    assert "a local .txt, .csv" in said


# Batches.


def encoded(rows: Rows, program: Program, tools: Tools, length: int = LIMIT, size: int = 2) -> Labelled:
    return encode_labelled(rows, program, tools, length=length, size=size)


def samples(found: Labelled, name: str = "input_ids") -> list[tuple[Any, Any]]:
    return [
        (ids, label)
        for batch in found.batches
        for ids, label in zip(batch[name].tolist(), batch["labels"].tolist(), strict=True)
    ]


def test_every_sample_keeps_its_label_and_nothing_is_padded(program: Program, tools: Tools) -> None:
    """The label is the row's number; so is the word, as often as the row is long."""
    rows = [(3 + i, 1 + i * 7 % 4) for i in range(10)]
    content = "text\tlabel\n" + "".join(f"{' '.join([WORDS[word]] * count)}\t{word}\n" for word, count in rows)

    found = encoded(read("a.tsv", content, task="regression"), program, tools)

    expected = {(float(word), count + 2) for word, count in rows}
    assert expected == {(label, len(ids)) for ids, label in samples(found)}
    assert all([1, *[int(label)] * (len(ids) - 2), 2] == ids for ids, label in samples(found))
    assert all(len(batch["labels"]) <= 2 and bool(batch["attention_mask"].all()) for batch in found.batches)
    assert "10 samples of 3 to 6 tokens from 10 rows of" in found.words
    for batch in found.batches:
        assert [*program.inputs, "labels"] == list(batch)
        program(**{name: value for name, value in batch.items() if name != "labels"})


def test_labels_have_the_type_of_their_task(program: Program, tools: Tools) -> None:
    classes = encoded(read("a.tsv", GLUE), program, tools)
    scores = encoded(read("a.tsv", task="regression"), program, tools)

    assert {torch.int64} == {batch["labels"].dtype for batch in classes.batches}
    assert {torch.float32} == {batch["labels"].dtype for batch in scores.batches}
    assert ("classification", ("0", "1"), 2) == (classes.task, classes.classes, classes.samples)
    assert classes.sha256 != scores.sha256


def test_the_two_texts_of_a_pair_are_told_apart_and_cut(program: Program, tools: Tools) -> None:
    content = "sentence1\tsentence2\tlabel\none\ttwo three\t0\none two three four\tfive\t1\n"

    found = encoded(read("a.tsv", content), program, tools, length=6)

    assert {((1, 3, 2, 4, 5, 2), 0), ((1, 3, 4, 2, 7, 2), 1)} == {(tuple(ids), y) for ids, y in samples(found)}
    types = {tuple(row) for batch in found.batches for row in batch["token_type_ids"].tolist()}
    assert {(0, 0, 0, 1, 1, 1), (0, 0, 0, 0, 1, 1)} == types


def test_a_row_without_text_is_left_out_with_its_label(program: Program, tools: Tools) -> None:
    found = encoded(read("a.tsv", "text\tlabel\none\t0\n \t1\ntwo\t2\n"), program, tools)

    assert [([1, 3, 2], 0), ([1, 4, 2], 2)] == samples(found)
    assert found.words.endswith(", 1 without text left out")


def test_documents_of_a_language_model_fill_samples(tools: Tools) -> None:
    program = words_program()
    rows = read("a.csv", "one two three\nfour five six\nseven\n")

    found = encoded(rows, program, Tools(tokenizer(special=False)), length=3)

    assert [([3, 4, 5], [3, 4, 5]), ([6, 7, 8], [6, 7, 8])] == samples(found)
    assert "2 samples of 3 tokens from 3 rows of" in found.words


def test_token_ids_of_a_language_model_are_cut(program: Program) -> None:
    found = encoded(read("a.jsonl", '{"input_ids": [3, 4, 5]}\n{"input_ids": [6]}\n'), program, Tools(), length=2)

    assert [([3, 4], [3, 4])] == samples(found)
    assert found.words.endswith(", 1 cut to 2 tokens, 1 of fewer than 2 tokens left out")


def test_without_a_task_there_are_no_labels(program: Program, tools: Tools) -> None:
    found = encoded(read("a.tsv", GLUE, task="none"), program, tools)

    assert all([*program.inputs] == list(batch) for batch in found.batches)


def test_training_takes_the_batches_as_they_are(program: Program, tools: Tools) -> None:
    found = encoded(read("a.tsv", GLUE * 3, label_column="label"), program, tools)

    taken = resolve(Context(resources={"train": found.batches}), "train", "test", program, 2)

    assert (found.samples, found.sha256) == (taken.samples, taken.sha256)


def test_a_model_with_one_batch_size_drops_what_is_left() -> None:
    rows = read("a.jsonl", "".join(json.dumps({"input_ids": [3] * 6, "label": i % 2}) + "\n" for i in range(5)))

    found = encoded(rows, fixed_program(batch=True), Tools(), length=6, size=4)

    assert [2, 2] == [len(batch["labels"]) for batch in found.batches]
    assert [0, 1, 0, 1] == [label for _, label in samples(found, "tokens")]
    assert found.words.endswith(", 1 left out that fill no batch of the one size that the model takes")


def refused_by(rows: Rows, program: Program, tools: Tools, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        encoded(rows, program, tools, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_the_model(program: Program, tools: Tools) -> None:
    classes = read("a.tsv", GLUE)
    ids = read("a.jsonl", '{"input_ids": [3, 40]}\n')

    assert "the model has no tokenizer here" in refused_by(classes, program, Tools())
    assert "holds text or token ids; the model takes pixel_values" in refused_by(classes, pixels_program(), tools)
    assert f"the model takes at most {LIMIT} tokens" in refused_by(classes, program, tools, length=LIMIT + 1)
    assert "found token id 40" in refused_by(ids, program, tools)
    assert "which the task lm is not for" in refused_by(read("b.txt", "one " * 99), seq2seq_program(), tools)
    assert "found no sample that the model can take" in refused_by(read("c.txt", "one"), program, tools)


# Pictures.


def picture_folder(*files: str) -> str:
    image = pytest.importorskip("PIL.Image", reason="pillow reads pictures")
    for i, file in enumerate(files):
        path = Path("pictures") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        image.new("RGB", (4, 4), (i, 0, 0)).save(path)
    return "pictures"


def picture_tools() -> Tools:
    def processor(images: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        red = torch.tensor([one.getpixel((0, 0))[0] for one in images]).float()
        return {"pixel_values": red[:, None, None, None].expand(-1, 3, 4, 4)}

    return Tools(images=lambda: processor)


def test_folders_of_pictures_are_classes() -> None:
    rows = read(picture_folder("dog/0.png", "cat/1.png", "cat/deeper/2.png", "dog/3.png"))

    found = encoded(rows, pixels_program(), picture_tools(), size=3)

    assert ("pictures", "classification", ("cat", "dog")) == (rows.kind, rows.task, rows.classes)
    assert {(1, 0), (2, 0), (0, 1), (3, 1)} == {
        (int(pixels[0, 0, 0]), int(label))
        for batch in found.batches
        for pixels, label in zip(batch["pixel_values"], batch["labels"], strict=True)
    }
    assert "4 pictures from 4 pictures of pictures" == found.words


def test_folders_of_splits_are_splits_of_pictures() -> None:
    source = picture_folder("train/cat/0.png", "train/dog/1.png", "test/dog/2.png", "test/cat/3.png")

    assert ["cat/0.png", "dog/1.png"] == [place for place, _ in read(source).items]
    assert ["cat/3.png", "dog/2.png"] == [place for place, _ in read(source, split="eval").items]


@pytest.mark.parametrize(
    ("files", "options", "said"),
    [
        (["cat/0.png", "1.png"], {}, "1.png lies in no folder; expected folders that name classes"),
        (["cat/0.png"], {}, "found only the label 'cat'"),
        (["cat/0.png", "dog/1.png"], {"classes": ("cat", "bird")}, "dog/1.png: found the label 'dog', expected one of"),
        (["cat/0.png", "dog/1.png"], {"task": "lm"}, "the task lm has no use for it"),
        (["train/cat/0.png"], {"split": "eval"}, "pictures holds train, expected validation or"),
    ],
)
def test_pictures_without_a_class(files: list[str], options: Any, said: str) -> None:
    assert said in refused(picture_folder(*files), **options)


def test_pictures_alone_need_no_folders_for_a_teacher() -> None:
    found = encoded(read(picture_folder("0.png", "1.png"), task="none"), pixels_program(), picture_tools())

    assert [["pixel_values"]] == [list(batch) for batch in found.batches]


# Real data.


@pytest.mark.parametrize(
    ("file", "options", "count", "task", "labels"),
    [
        ("sst2/dev.tsv", {}, 872, "classification", {0: 428, 1: 444}),
        ("cola/dev.tsv", {"text_columns": ["3"], "label_column": "1"}, 1043, "classification", {0: 322, 1: 721}),
        ("mrpc/dev.tsv", {}, 408, "classification", {0: 129, 1: 279}),
        ("mrpc/msr_paraphrase_test.txt", {"label_column": "Quality"}, 1725, "classification", {0: 578, 1: 1147}),
        ("rte/dev.tsv", {}, 277, "classification", {0: 146, 1: 131}),
        ("stsb/dev.tsv", {}, 1500, "regression", None),
        ("stsb/sts-test.tsv", {"text_columns": ["5", "6"], "label_column": "4"}, 1379, "regression", None),
        ("sick/SICK_trial.txt", {"task": "regression"}, 500, "regression", None),
        ("sick/SICK_trial.txt", {"task": "classification"}, 500, "classification", {0: 74, 1: 144, 2: 282}),
        ("wikitext2/valid.txt", {}, None, "lm", None),
        ("model_babyllama105/validation.jsonl", {}, 64, "lm", None),
    ],
)
def test_public_data_sets_are_read(file: str, options: Any, count: int | None, task: str, labels: Any) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is not here; SPARSEC_DATA names the folder of data sets")

    found = read(str(SHARED / file), **options)

    assert task == found.task
    assert count in (None, len(found.items))
    if labels is not None:
        assert labels == Counter(found.labels)
    if task == "regression":
        assert found.labels and 0 <= min(found.labels) < max(found.labels) <= 5


def test_reading_rows_loads_no_torch() -> None:
    code = "import sys; from sparsec.training import labelled; print('torch' in sys.modules)"

    assert "False\n" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
