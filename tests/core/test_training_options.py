"""--method and what goes with it become pass text; a head fits its data or is refused; nothing is asked for in vain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import models
import pytest
import torch
from data_models import Words, seq2seq_program, words_program
from task_models import sentences
from torch import nn

from sparsec import heads, methods, registry, resuming, tasks, teachers
from sparsec.data import Tools
from sparsec.errors import UsageError
from sparsec.heads import Head
from sparsec.loaded import Loaded
from sparsec.methods import Training
from sparsec.passes.fixed_mask import FixedMask
from sparsec.program import Program
from sparsec.recipe import Recipe
from sparsec.shorthand import recipe_of
from sparsec.tracing import trace

TWO = ("bad", "good")


def wide_program() -> Program:
    class Wide(Words):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(4, 6)

    inputs = {name: torch.ones(2, 5, dtype=torch.int64) for name in ("input_ids", "token_type_ids")}
    inputs["attention_mask"] = torch.ones(2, 5, dtype=torch.int64)
    return trace(models.made(Wide), inputs)


def passes(**options: Any) -> str:
    """The passes of a recipe of these options."""
    names = [field.name for field in dataclasses.fields(Training)]
    given = {name: options.pop(name) for name in names if name in options}
    rest = {"train": "x.csv", **options}
    first = ("m", "2:4", None, None, False, None, rest.pop("passes", None), rest.pop("score", None), None, None, None)
    return recipe_of(*first, training=Training(**given), **rest).passes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "admm", "epochs": 3, "lr": 1e-4, "batch_size": 32}, "admm{epochs=3, lr=0.0001, batch_size=32}"),
        ({"method": "admm{rho=1e-2, every=50}", "epochs": 3}, "admm{epochs=3, rho=0.01, every=50}"),
        ({"method": "sr-ste", "teacher": "a/b c"}, 'sr-ste{distill=1.0, teacher="a/b c"}'),
        ({"method": "sr-ste{distill=3}", "teacher": "dense"}, "sr-ste{distill=3.0}"),
        ({"method": "gradual", "task": "causal-lm"}, "gradual{loss=lm}"),
        ({"method": "gradual{loss=none, distill=1}", "task": "causal-lm"}, "gradual{loss=none, distill=1.0}"),
        ({"method": "fixed-mask"}, "fixed-mask"),
        ({"method": "imp{data=y.csv, rewind=initial}", "train": None}, "imp{data=y.csv, rewind=initial}"),
        ({"method": "fixed-mask", "solver": "refit"}, "oneshot{solver=refit} | fixed-mask"),
        ({"method": "fixed-mask", "score": "ria"}, "mask{score=ria} | fixed-mask"),
    ],
)
def test_the_options_become_pass_text(options: dict[str, Any], expected: str) -> None:
    assert expected == passes(**options)


def test_a_method_of_another_distribution_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(FixedMask):
        name: ClassVar[str] = "theirs"

    known = registry.pass_class
    entries = {**registry.passes(), "theirs": registry.Entry("theirs", "x:Theirs", "other")}
    monkeypatch.setattr(registry, "passes", lambda: entries)
    monkeypatch.setattr(registry, "pass_class", lambda name: Theirs if name == "theirs" else known(name))

    assert Theirs is methods.method_class("theirs")
    assert {"fixed-mask", "admm", "sr-ste", "gradual", "theirs"} <= set(methods.names())
    assert not {"mask", "oneshot", "freeze"} & set(methods.names())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "adam"}, "--method adam is unknown; the methods are fixed-mask, admm, sr-ste, gradual"),
        ({"method": "mask"}, "--method mask is a pass that does not train; the methods are"),
        ({"method": "admm", "train": None}, "--method admm trains: add --train DATA"),
        ({"method": "admm", "passes": "admm"}, "--method writes the training pass; with --passes, put it there"),
        ({"epochs": 3}, "--epochs goes with --method"),
        ({"batch_size": 3}, "--batch-size goes with --method"),
        ({"method": "admm{epochs=2}", "epochs": 3}, "--epochs 3 and admm{epochs=2} both say epochs; leave one out"),
        ({"method": "admm{batch_size=2}", "batch_size": 3}, "--batch-size 3 and admm{batch_size=2} both say"),
        ({"method": "admm", "epochs": 0}, "--epochs 0: expected a number above 0"),
        ({"method": "admm", "lr": 0.0}, "--lr 0: expected a number above 0"),
        ({"method": "admm", "lr": float("nan")}, "--lr nan: expected a number above 0"),
        ({"method": "admm", "solver": "alps"}, "admm chooses them while it trains"),
        ({"method": "admm{rho=0}"}, "rho is 0; expected a number above 0"),
        ({"method": "admm{"}, "method text 'admm{'"),
        ({"method": "admm", "task": "translation"}, "task: Input should be"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        passes(**options)

    assert message in str(caught.value)


# Data -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "x.csv"}, "--train x.csv: no pass trains"),
        ({"train": "x.csv", "passes": "mask | freeze"}, "no pass trains (mask | freeze)"),
        ({"passes": "admm"}, "pass admm needs data to train on: give --train DATA"),
        ({"passes": "admm{data=mine}"}, "resources={'mine': [...]}"),
        ({"task": "regression"}, "--task regression is for data of a task: add --train DATA"),
        ({"label_column": "y"}, "--label-column y is for data of a task"),
        ({"train": "none.csv", "passes": "admm"}, "there is no such file"),
        ({"train": "x.csv", "passes": "admm", "label_column": "y"}, "no column 'y' (--label-column)"),
        ({"train": "text.txt", "passes": "admm"}, "to learn the next token write admm{loss=lm}"),
        ({"eval": "text.txt", "task": "none"}, "found no labels, so there is nothing to judge by"),
        ({"train": "x.csv", "passes": "admm", "task": "image-classification"}, "does not fit"),
        ({"train": "x.csv", "passes": "admm{data=y.csv}"}, "--train x.csv: no pass reads it (admm{data=y.csv})"),
        ({"passes": "admm{data=y.csv}"}, "DATA y.csv: there is no such file"),
        ({"passes": "admm{data=text.txt}"}, "to learn the next token write admm{loss=lm}"),
        ({"passes": "admm{data=x.csv}", "eval": "z.csv"}, "found the label '2', expected one of the 2 classes"),
        ({"train": "x.csv", "passes": "admm", "bias": "overlap"}, "--bias overlap: no pass works against a bias of"),
        ({"train": "x.csv", "passes": "admm{loss=poe}"}, "x.csv has no bias model's columns"),
        ({"train": "x.csv", "passes": "admm{loss=poe}", "bias": "overlap"}, "found no pairs of texts"),
        ({"train": "text.txt", "passes": "admm{loss=poe}"}, "the bias of a text without labels cannot be modelled"),
    ],
)
def test_data_that_nothing_can_be_done_with_is_refused(
    fields: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sentences("x.csv", 8)
    sentences("z.csv", 9, names=("0", "1", "2"))
    Path("text.txt").write_text("the good film was quite good\n" * 9)
    with pytest.raises(UsageError) as caught:
        tasks.prepare(Recipe(model="m", targets={}, **fields), {}, None)

    assert message in str(caught.value)


def test_data_of_one_name_cannot_come_from_python_and_by_name() -> None:
    with pytest.raises(UsageError, match="train data were given in Python and by name"):
        tasks.prepare(Recipe(model="m", targets={}, passes="admm", train="x.csv"), {"train": []}, None)


def test_passes_name_data_of_their_own_and_only_those_with_a_loss_against_a_bias_read_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        rows = "".join(f"the film,the {word} film,{i % 2}\n" for i, word in enumerate(["good", "bad"] * 4))
        Path(f"{name}.csv").write_text("premise,hypothesis,label\n" + rows)
    text = "mask-training{data=b.csv, loss=poe} | fixed-mask | fixed-mask{data=mine}"
    recipe = Recipe(model="m", targets={}, passes=text, train="a.csv", eval="a.csv", bias="overlap")
    work = tasks.prepare(recipe, {"mine": []}, None)

    assert ["train", "b.csv", "eval"] == list(work.rows)
    assert [False, True, False] == [rows.bias is not None for rows in work.rows.values()]
    assert {str(tmp_path / "b.csv")} <= set(resuming.files_of(work.named))


def test_the_rows_say_which_head_a_model_needs(tmp_path: Path) -> None:
    data = sentences(str(tmp_path / "x.csv"), 8, names=("good", "bad"))
    plain = tasks.prepare(Recipe(model="m", targets={}, eval=data), {}, None)
    named = tasks.prepare(Recipe(model="m", targets={}, eval=data, task="sequence-classification"), {}, None)
    text = tasks.prepare(Recipe(model="m", targets={}, passes="admm{distill=1}", train=data, task="none"), {}, None)

    assert Head("sequence-classification", TWO) == plain.head
    assert Head("sequence-classification", TWO, asked=True) == named.head
    assert text.head is None


# Teachers -------------------------------------------------------------------------------------------------------------


class Vocabulary(dict[str, int]):
    """What a tokenizer is asked for here."""

    def get_vocab(self) -> dict[str, int]:
        return self


@pytest.mark.parametrize(
    ("teacher", "words", "message"),
    [
        (words_program, Vocabulary(a=1), "has another vocabulary, of 1 tokens where the model has 2"),
        (seq2seq_program, None, "takes decoder_input_ids, which the model, with input_ids, token_type_ids"),
        (wide_program, None, "its output output is [2, 5, 6], the model's [2, 5, 4]"),
        (words_program, None, ""),
    ],
)
def test_a_teacher_must_fit(
    teacher: Callable[[], Program], words: Vocabulary | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = Loaded(words_program(), (), "", Tools(Vocabulary(a=0, b=1)))
    monkeypatch.setattr(teachers, "load_model", lambda *_: Loaded(teacher(), (), "", Tools(words)))
    recipe = Recipe(model="m", targets={})
    if not message:
        assert list(student.program.inputs) == list(teachers.load_teacher("t", recipe, student, False, True).inputs)
        return
    with pytest.raises(UsageError) as caught:
        teachers.load_teacher("t", recipe, student, False, True)

    assert message in str(caught.value)


def test_resume_looks_at_the_files_of_data_and_teachers(tmp_path: Path) -> None:
    data, teacher = sentences(str(tmp_path / "x.csv"), 8), tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").touch()
    text = f"admm{{distill=1, teacher={teacher}}} | fixed-mask{{distill=1}}"
    work = tasks.prepare(Recipe(model="m", targets={}, passes=text, train=data, eval=data), {}, None)
    files = resuming.key_of(words_program(), work.recipe.model_dump(mode="json"), work.teachers)["files"]

    assert [str(teacher)] == work.teachers
    assert {data, str(teacher / "config.json")} == set(files)


# Heads ----------------------------------------------------------------------------------------------------------------


def config(name: str, labels: int = 2, **others: Any) -> Any:
    return SimpleNamespace(
        architectures=[name], num_labels=labels, id2label={i: f"LABEL_{i}" for i in range(labels)}, **others
    )


def test_a_head_of_the_right_size_is_kept() -> None:
    for asked in (False, True):
        assert (
            heads.prepare(config("XForSequenceClassification"), Head("sequence-classification", TWO, asked), "m")
            is None
        )
        assert heads.prepare(config("XForCausalLM"), Head("causal-lm", (), asked), "m") is None
        assert heads.prepare(config("XForSequenceClassification", 1), Head("regression", (), asked), "m") is None


def test_any_other_is_made_anew_where_the_task_was_named() -> None:
    bare, three = config("XModel"), config("XForSequenceClassification", 3)

    assert "AutoModelForSequenceClassification" == heads.prepare(bare, Head("regression", (), True), "m")
    assert ({0: "value"}, "regression") == (bare.id2label, bare.problem_type)
    assert heads.prepare(three, Head("sequence-classification", TWO, True), "m") is None
    assert ({0: "bad", 1: "good"}, {"bad": 0, "good": 1}) == (three.id2label, three.label2id)
    assert "AutoModelForCausalLM" == heads.prepare(config("XModel"), Head("causal-lm", (), True), "m")


def test_and_refused_where_it_was_not() -> None:
    with pytest.raises(UsageError, match="m is XModel, which has no head for 2 classes; add --task sequence-classif"):
        heads.prepare(config("XModel"), Head("sequence-classification", TWO), "m")
    with pytest.raises(UsageError, match="has a head for 3 labels, and the data ask for 2 classes; give data of its 3"):
        heads.prepare(config("XForSequenceClassification", 3), Head("sequence-classification", TWO), "m")


def test_a_stored_head_names_its_classes() -> None:
    named = config("XForSequenceClassification")
    named.id2label = {1: "yes", 0: "no"}

    assert ("no", "yes") == heads.class_names(named)
    assert ("0", "1", "2") == heads.class_names(config("XForSequenceClassification", 3))
    assert () == heads.class_names(config("XModel"))


def test_a_decoder_without_padding_gets_a_token_that_is_none() -> None:
    class Model:
        def __init__(self, end: int | None) -> None:
            self.config = SimpleNamespace(pad_token_id=None, eos_token_id=end)

    models = Model(7), Model(None)
    for one in models:
        heads.settle(one)

    assert [7, -1] == [one.config.pad_token_id for one in models]
