"""Calibration data: samples that fit the model, nothing padded, the same for a seed, refused in one paragraph."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from data_models import (
    LIMIT,
    VOCABULARY,
    WORDS,
    fixed_program,
    pixels_program,
    seq2seq_program,
    tokenizer,
    words_program,
)

from sparsec import text
from sparsec.data import Calibration, Deferred, Request, Tools, calibration, content_hash, given
from sparsec.errors import UsageError
from sparsec.loaded import with_random_samples
from sparsec.pipeline import Context
from sparsec.program import Program

SHARED = Path(os.environ.get("SPARSEC_DATA", "../shared/data"))
PROSE = " ".join(WORDS[3 + i % 10] for i in range(500))


@pytest.fixture(scope="module")
def program() -> Program:
    return words_program()


@pytest.fixture(scope="module")
def tools() -> Tools:
    return Tools(tokenizer())


def write(path: Path, content: str) -> str:
    path.write_text(content)
    return str(path)


def rows(path: Path, lengths: list[int]) -> str:
    """A .jsonl of token ids, of these lengths."""
    return write(path, "".join(json.dumps({"input_ids": [3 + i % 10 for i in range(n)]}) + "\n" for n in lengths))


def refused(program: Program, tools: Tools, **request: Any) -> str:
    with pytest.raises(UsageError) as caught:
        calibration(program, tools, Request(**request))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids_of(found: Calibration) -> list[list[int]]:
    return [row for batch in found.batches for row in next(iter(batch.values())).tolist()]


def test_samples_of_one_length_form_batches_without_padding(program: Program, tmp_path: Path) -> None:
    found = calibration(program, Tools(), Request(rows(tmp_path / "a.jsonl", [3, 5, 3, 7, 5, 3])))

    assert [(3, 3), (2, 5), (1, 7)] == [tuple(batch["input_ids"].shape) for batch in found.batches]
    assert all(bool(batch["attention_mask"].all()) for batch in found.batches)
    assert all(not batch["token_type_ids"].any() for batch in found.batches)
    assert all(list(batch) == list(program.inputs) for batch in found.batches)
    assert "6 samples of 3 to 7 tokens (128 were asked for) from a.jsonl" == found.words
    for batch in found.batches:
        program(**batch)


def test_a_batch_has_a_bounded_number_of_tokens(tmp_path: Path) -> None:
    found = calibration(seq2seq_program(), Tools(), Request(rows(tmp_path / "a.jsonl", [100] * 43)))

    assert [20, 20, 3] == [len(batch["input_ids"]) for batch in found.batches]


def test_the_same_seed_gives_the_same_samples_and_another_others(
    program: Program, tools: Tools, tmp_path: Path
) -> None:
    content = "".join(f"{WORDS[3 + i % 10]} {WORDS[3 + i // 10]}\n" for i in range(100))
    source = write(tmp_path / "a.csv", content)

    first, again, other = (
        calibration(program, tools, Request(source, samples=20, columns=("0",), seed=seed)) for seed in (0, 0, 1)
    )

    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256
    assert sorted(ids_of(first)) != sorted(ids_of(other))


def test_long_text_is_cut_into_full_samples_with_special_tokens(program: Program, tools: Tools, tmp_path: Path) -> None:
    found = calibration(program, tools, Request(write(tmp_path / "a.txt", PROSE), samples=30, length=10))

    assert "30 samples of 10 tokens from a.txt" == found.words
    assert all(row[0] == 1 and row[-1] == 2 and not {1, 2} & set(row[1:-1]) for row in ids_of(found))


def test_every_word_of_a_text_is_used_at_most_once(program: Program, tmp_path: Path) -> None:
    lines = "\n".join(" ".join([WORDS[3 + i]] * 4) for i in range(10))
    source = write(tmp_path / "a.txt", lines)

    found = calibration(program, Tools(tokenizer(special=False)), Request(source, samples=99, length=4))

    assert 10 == found.samples
    assert sorted([3 + i] * 4 for i in range(10)) == sorted(ids_of(found))


def test_a_row_is_a_sample_cut_to_the_length(program: Program, tools: Tools, tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "label,sentence\n1,one two\n\n0,\n0,three four five six\n")

    found = calibration(program, tools, Request(source, samples=2, length=5))

    assert [[1, 3, 4, 2], [1, 5, 6, 7, 2]] == ids_of(found)
    assert "2 samples of 4 to 5 tokens from a.csv (sentence)" == found.words


def test_pairs_of_texts_keep_their_types(program: Program, tools: Tools, tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "premise,hypothesis\none two,three\n")

    found = calibration(program, tools, Request(source, samples=1))

    assert [[1, 3, 4, 2, 5, 2]] == found.batches[0]["input_ids"].tolist()
    assert [[0, 0, 0, 0, 1, 1]] == found.batches[0]["token_type_ids"].tolist()


def test_the_default_is_docstrings_none_of_which_is_held_out(program: Program, tools: Tools) -> None:
    found = calibration(program, tools, Request(samples=8))

    assert f"8 samples of {LIMIT} tokens from docstrings of the Python standard library" == found.words
    held_out = text.passages()
    documents = list(text.docstrings(random.Random(0)))
    assert 500_000 < sum(map(len, documents))
    assert not set(documents) & set(held_out)
    for held in held_out:  # the first 64 tokens are what quality is measured on
        assert not any(held[:150] in document for document in documents)


def test_docstrings_come_in_an_order_of_the_seed() -> None:
    def first(seed: int) -> list[str]:
        found = text.docstrings(random.Random(seed))
        return [next(found) for _ in range(20)]

    assert first(0) == first(0)
    assert first(0) != first(1)


def test_a_decoder_gets_half_of_the_tokens(tmp_path: Path) -> None:
    found = calibration(seq2seq_program(), Tools(), Request(rows(tmp_path / "a.jsonl", [9, 1])))

    assert [(1, 1), (1, 4)] == [tuple(batch["decoder_input_ids"].shape) for batch in found.batches]


@pytest.mark.parametrize(("whole_batches", "count"), [(False, 3), (True, 2)])
def test_a_model_of_fixed_sizes_gets_exactly_those(whole_batches: bool, count: int, tmp_path: Path) -> None:
    program = fixed_program(whole_batches)

    found = calibration(program, Tools(), Request(rows(tmp_path / "a.jsonl", [6, 9, 4, 7])))

    assert count == found.samples
    assert {6} == {len(row) for row in ids_of(found)}
    for batch in found.batches:
        program(**batch)


def test_fewer_samples_than_asked_for_are_said(
    program: Program, tools: Tools, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = calibration(program, tools, Request(write(tmp_path / "a.txt", PROSE), samples=512, length=10))

    assert "62 samples of 10 tokens (512 were asked for) from a.txt" == found.words
    assert found.words in caplog.text


def test_more_tokens_than_the_model_takes_are_refused_and_the_default_is_cut(program: Program, tools: Tools) -> None:
    assert f"at most {LIMIT} tokens" in refused(program, tools, length=LIMIT + 1)
    assert {LIMIT} == {len(row) for row in ids_of(calibration(program, tools, Request(samples=2)))}


@pytest.mark.parametrize(("columns", "least"), [(("0",), 3), (("0", "1"), 5)])
def test_no_room_beside_special_tokens_is_refused(
    program: Program, tools: Tools, columns: tuple[str, ...], least: int, tmp_path: Path
) -> None:
    source = write(tmp_path / "a.csv", "one two,three four\n")

    assert f"at least {least}" in refused(program, tools, source=source, length=least - 1, columns=columns)
    assert 1 == calibration(program, tools, Request(source, 1, least, columns)).samples


def test_text_without_tokenizer_asks_for_ids(program: Program, tmp_path: Path) -> None:
    assert "input_ids" in refused(program, Tools(), source=write(tmp_path / "a.txt", PROSE))
    assert "no tokenizer here" in refused(program, Tools())
    assert "a folder of pictures" in refused(pixels_program(), Tools())


def test_ids_of_another_vocabulary_are_refused_by_line(program: Program, tools: Tools, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", f'{{"input_ids": [1, 2]}}\n{{"input_ids": [1, {VOCABULARY}]}}\n')

    said = refused(program, Tools(), source=source)
    assert f"a.jsonl, line 2: found token id {VOCABULARY}; the model has {VOCABULARY} tokens" in said
    other = write(tmp_path / "a.csv", "text\none ten\n")
    assert "another tokenizer's" in refused(program, Tools(tools.tokenizer, vocabulary=5), source=other)


def test_data_of_which_no_sample_fits_is_refused(program: Program, tools: Tools, tmp_path: Path) -> None:
    assert "no sample" in refused(fixed_program(), Tools(), source=rows(tmp_path / "a.jsonl", [3]))
    assert "no sample" in refused(program, tools, source=write(tmp_path / "a.csv", "text,label\n,1\n"))
    assert "no sample" in refused(program, tools, source=write(tmp_path / "a.txt", "one two"), length=10)


def test_batches_given_in_python_stand_as_they_are(program: Program) -> None:
    made = [{name: torch.ones(n, n + 1, dtype=torch.int64) for name in program.inputs} for n in (1, 2)]

    found = calibration(program, Tools(given=given(iter(made))), Request("ignored"))

    assert 3 == found.samples
    assert content_hash(made) == found.sha256
    assert all(found.batches[i][name] is made[i][name] for i in range(2) for name in program.inputs)


@pytest.mark.parametrize("change", [{"input_ids": torch.ones(1, LIMIT + 1, dtype=torch.int64)}, {"x": torch.ones(1)}])
def test_given_batches_that_do_not_fit_are_refused(program: Program, change: dict[str, torch.Tensor]) -> None:
    batch = {name: torch.ones(1, 3, dtype=torch.int64) for name in program.inputs}

    assert "batch 1" in refused(program, Tools(given=given([batch, {**batch, **change}])))
    assert "batch 0" in refused(program, Tools(given=given([{key: value.float() for key, value in batch.items()}])))


@pytest.mark.parametrize("batches", [[], [{}], [torch.ones(1)], [{"x": [1, 2]}]])
def test_what_is_no_input_is_refused(batches: Any) -> None:
    with pytest.raises(UsageError, match="dict of input tensors"):
        given(batches)


def test_the_hash_tells_names_types_and_shapes_apart() -> None:
    zeros = torch.zeros(2, 2)
    variants: list[list[dict[str, torch.Tensor]]] = [
        [{"a": zeros}],
        [{"b": zeros}],
        [{"a": zeros.view(4)}],
        [{"a": zeros.int()}],
        [{"a": zeros}, {"a": zeros}],
        [{"a": torch.ones(2, 2)}],
    ]

    assert len(variants) == len({content_hash(variant) for variant in variants})


def test_data_is_made_when_a_pass_first_asks_and_once(program: Program, tmp_path: Path) -> None:
    data = Deferred(program, Tools(), Request(str(tmp_path / "later.jsonl")))
    context = Context(resources={"calibration": data})
    assert {} == data.describe()
    rows(tmp_path / "later.jsonl", [3] * 128)

    found = context.calibration("oneshot")

    assert found is context.calibration("oneshot")
    assert {"words", "sha256", "samples"} == set(data.describe()["calibration"])


def test_a_pass_without_data_says_how_to_give_it() -> None:
    with pytest.raises(UsageError, match="pass oneshot needs calibration data: give --calib"):
        Context().calibration("oneshot")


def test_named_data_that_no_pass_asks_for_is_said(program: Program, caplog: pytest.LogCaptureFixture) -> None:
    Deferred(program, Tools(), Request("a.txt")).describe()

    assert "no pass of the recipe" in caplog.text


def test_pictures_go_through_the_image_processor(tmp_path: Path) -> None:
    image, processors = pytest.importorskip("PIL.Image", reason="pillow reads pictures"), []
    for i in range(11):
        image.new("L" if i % 2 else "RGB", (6 + i, 5), i).save(tmp_path / f"{i}.png")

    def processor() -> Any:
        from transformers import ViTImageProcessor

        processors.append(ViTImageProcessor(size={"height": 4, "width": 4}))
        return processors[-1]

    found = calibration(pixels_program(), Tools(images=processor), Request(str(tmp_path), samples=9))

    assert [(8, 3, 4, 4), (1, 3, 4, 4)] == [tuple(batch["pixel_values"].shape) for batch in found.batches]
    assert f"9 pictures from {tmp_path.name}" == found.words
    assert 1 == len(processors)


def test_pictures_that_cannot_be_are_refused_by_name(program: Program, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason="pillow reads pictures")
    write(tmp_path / "broken.jpg", "no picture")

    tools = Tools(images=lambda: None)
    assert "broken.jpg is no picture" in refused(pixels_program(), tools, source=str(tmp_path))
    assert "no image processor" in refused(pixels_program(), Tools(), source=str(tmp_path))
    assert "no inputs of this model" in refused(program, tools, source=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "columns", "words"),
    [
        ("sst2/dev.tsv", (), "(sentence)"),
        ("cola/dev.tsv", ("3",), "(3)"),
        ("mrpc/dev.tsv", (), "(#1 String and #2 String)"),
        ("wikisplit/validation.tsv", ("0",), "(0)"),
    ],
)
def test_public_data_sets_are_read(
    file: str, columns: tuple[str, ...], words: str, program: Program, tools: Tools
) -> None:
    if not (SHARED / file).is_file():
        pytest.skip(f"{SHARED / file} is not here; SPARSEC_DATA names the folder of data sets")

    found = calibration(program, tools, Request(str(SHARED / file), columns=columns))

    assert 128 == found.samples
    assert found.words.endswith(words)


def test_public_token_files_are_read(tmp_path: Path) -> None:
    file = SHARED / "model_babyllama105" / "calibration.jsonl"
    if not file.is_file():
        pytest.skip(f"{file} is not here; SPARSEC_DATA names the folder of data sets")

    found = calibration(seq2seq_program(), Tools(vocabulary=105), Request(str(file), length=200))

    assert "128 samples of 200 tokens from calibration.jsonl" == found.words
    expected = [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]
    assert sorted(expected) == sorted(ids_of(found))


@pytest.mark.parametrize(("fixed", "judged"), [(False, [1] * 8), (True, [9])])
def test_quality_is_judged_on_single_samples_where_a_batch_may_be_split(fixed: bool, judged: list[int]) -> None:
    program = fixed_program(batch=fixed)
    data = given([{"tokens": torch.zeros(size, 6).long()} for size in (1, 9)])
    found = with_random_samples(program, 0).judged_on(data)

    assert judged == [len(batch["tokens"]) for batch in found.samples]
    assert f"{sum(judged)} of the samples that it was calibrated on" == found.samples_are
    assert with_random_samples(program, 0).judged_on(None).made_up
