"""Calibration data on the command line and in Python: made for the model, told in the manifest, refused early."""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import torch
import yaml
from data_models import Tokens, fixed_program
from typer.testing import CliRunner

import sparsec
from sparsec import show
from sparsec.api import Options
from sparsec.cli import app

QUICK = Options(allow_dense=True, measure_speed=False)
PASSES = "oneshot{solver=refit}"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT with a tokenizer that knows English."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizer

    from sparsec import text

    folder = tmp_path_factory.mktemp("model")
    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(text.passages()[:40], vocab_size=400, show_progress=False)
    BertTokenizer(trained.get_vocab()).save_pretrained(folder)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=400, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return str(folder)


def run(code: int, *args: str) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr.strip()


def write_ids(path: str, length: int = 6) -> str:
    Path(path).write_text("".join(json.dumps({"input_ids": [1 + i % 9] * length}) + "\n" for i in range(40)))
    return path


def test_the_options_become_the_recipe() -> None:
    made = yaml.safe_load(
        run(0, "compile", "demo:minilm", "--pattern", "2:4", "--dry-run", "--calib", "glue/qnli", "--text-columns",
            "question,sentence", "--num-calibration-samples", "9", "--max-seq-length", "70")
    )  # fmt: skip

    assert "glue/qnli" == made["calib"]
    assert ["question", "sentence"] == made["text_columns"]
    assert (9, 70) == (made["num_calibration_samples"], made["max_seq_length"])


def test_compile_says_which_data_it_used_and_its_recipe_gives_the_same(bert: str) -> None:
    Path("texts.csv").write_text("sentence\n" + "".join(f"the model takes {i} samples of text\n" for i in range(40)))
    args = ("--force", "--passes", PASSES, "--num-calibration-samples", "20", "--allow-dense", "--json", "-o", "a")

    first = json.loads(run(0, "compile", bert, "--pattern", "2:4", "--calib", "texts.csv", *args))
    again = json.loads(
        run(0, "compile", "--recipe", "a/manifest.json", "--force", "--allow-dense", "--json", "-o", "a")
    )

    assert first["calibration"] == again["calibration"]
    assert 20 == first["calibration"]["samples"]
    assert first["calibration"]["words"].endswith("from texts.csv (sentence)")


def test_the_default_is_docstrings_cut_to_the_model(bert: str) -> None:
    artifact = sparsec.compile(bert, out="a", pattern="2:4", passes=PASSES, num_calibration_samples=8, options=QUICK)

    assert (
        "8 samples of 64 tokens from docstrings of the Python standard library"
        == artifact.manifest["calibration"]["words"]
    )


def test_a_compile_without_such_a_pass_has_no_calibration(bert: str) -> None:
    made = sparsec.compile(bert, out="a", pattern="2:4", passes="mask | freeze", options=QUICK)
    again = json.loads(run(0, "compile", bert, "--pattern", "2:4", "--solver", "none", "--json", "-o", "b"))

    for manifest in (made.manifest, again):
        assert not {"calibration", "uncalibrated"} & set(manifest)
        assert "mask | freeze" == manifest["recipe"]["passes"]


def test_by_default_a_model_is_pruned_with_data_where_there_is_some_and_the_recipe_says_so(
    bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = sparsec.compile(bert, out="a", pattern="2:4", num_calibration_samples=8, options=QUICK).manifest
    tokens = {"tokens": torch.randint(0, 9, (4, 6))}
    given = sparsec.compile(
        models.made(Tokens), tokens, out="b", pattern="2:4", calibration=[tokens], options=QUICK
    ).manifest
    none = sparsec.compile(models.made(Tokens), tokens, out="c", pattern="2:4", options=QUICK).manifest

    allowed = "oneshot{unreached=dense}"  # what allow_dense makes of it
    assert [allowed, allowed, "mask | freeze"] == [each["recipe"]["passes"] for each in (text, given, none)]
    assert [8, 4, 0] == [each.get("calibration", {"samples": 0})["samples"] for each in (text, given, none)]
    assert [False, False, True] == ["uncalibrated" in each for each in (text, given, none)]
    show.manifest(none, 0)
    said = " ".join(capsys.readouterr().out.split())
    assert "Pruned by magnitude, without data: the model takes tokens" in said
    assert "has no tokenizer here, so there is no data by default; give --calib" in said


def test_quality_is_judged_on_the_data_where_no_others_are_known() -> None:
    Path("mine.py").write_text(
        "import models, torch\nfrom data_models import Tokens\n"
        "def make(): return models.made(Tokens), {'tokens': torch.ones(2, 6, dtype=torch.long)}\n"
    )
    tokens = [{"tokens": torch.randint(0, 9, (size, 6))} for size in (5, 9)]
    asked = {"pattern": "2:4", "options": QUICK}
    data = sparsec.compile("mine:make", out="a", calibration=tokens, **asked).manifest["quality"]
    none = sparsec.compile("mine:make", out="b", calibration=tokens, passes="mask | freeze", **asked).manifest[
        "quality"
    ]

    assert "8 of the samples that it was calibrated on" == data["samples"]
    assert "random inputs like the example's" == none["samples"]


def test_quality_below_the_asked_one_leaves_only_the_pruning_which_resume_takes_up(bert: str) -> None:
    asked = ("compile", bert, "--pattern", "2:8", "--num-calibration-samples", "8", "-o", "q.sparsec")
    said = run(1, *asked, "--min-quality", "1")

    assert "--min-quality 1.0 was asked for; nothing written" in said
    assert ".q.sparsec.work: --resume goes on from there" in said
    assert [".q.sparsec.work"] == [path.name for path in Path().iterdir()]

    run(0, *asked, "--resume")

    assert ["q.sparsec"] == [path.name for path in Path().iterdir()]


def test_batches_from_python_are_named_by_hash_and_asked_for_again() -> None:
    torch.manual_seed(0)
    batches = [{"tokens": torch.randint(0, 9, (4, 6))} for _ in range(3)]
    example = {"tokens": batches[0]["tokens"]}

    artifact = sparsec.compile(
        models.made(Tokens), example, out="a", pattern="2:4", passes=PASSES, calibration=iter(batches), options=QUICK
    )

    manifest = artifact.manifest
    assert 12 == manifest["calibration"]["samples"]
    assert f"given:{manifest['calibration']['sha256']}" == manifest["recipe"]["calib"]
    with pytest.raises(sparsec.SparsecError, match="give the same ones again"):
        sparsec.compile(
            models.made(Tokens), example, out="b", pattern="2:4", passes=PASSES,
            calibration=manifest["recipe"]["calib"], options=QUICK,
        )  # fmt: skip


def test_a_module_without_data_is_told_what_to_give() -> None:
    with pytest.raises(sparsec.SparsecError, match="no tokenizer here") as caught:
        sparsec.compile(
            models.made(Tokens), [torch.ones(2, 6, dtype=torch.int64)], out="a", pattern="2:4", passes=PASSES,
            options=QUICK,
        )  # fmt: skip

    assert 2 == caught.value.exit_code
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--calib", "nowhere.csv"), "there is no such file"),
        (("--calib", "data.xml"), "cannot be read; expected .txt"),
        (("--num-calibration-samples", "0"), "num_calibration_samples: Input should be greater than 0; found 0"),
        (("--max-seq-length", "-1"), "max_seq_length: Input should be greater than 0; found -1"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(options: tuple[str, ...], said: str) -> None:
    Path("data.xml").write_text("<a/>")

    assert said in run(2, "compile", "no/such-model", "--pattern", "2:4", *options)
    assert ["data.xml"] == [path.name for path in Path().iterdir()]


def test_opt_runs_a_pass_on_data() -> None:
    fixed_program().save("p")

    said = run(0, "opt", "p", "--passes", "oneshot{pattern=2:4, solver=refit}", "--calib", write_ids("ids.jsonl"))

    assert "frozen" in said
    assert "at most 6 tokens" in run(
        2, "opt", "p", "--passes", "oneshot{pattern=2:4}", "--calib", "ids.jsonl", "--max-seq-length", "7"
    )
    said = run(2, "opt", "p", "--passes", "oneshot{pattern=2:4}", "--num-calibration-samples", "0")
    assert "--num-calibration-samples is 0" in said
