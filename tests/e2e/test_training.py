"""Training by name: labelled data, a new head, a teacher, figures of the task in the manifest, and the same again."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from task_models import bert, sentences
from typer.testing import CliRunner

import sparsec
from sparsec.api import Options, compile_recipe
from sparsec.cli import app
from sparsec.recipe import Recipe

DATA = Path(os.environ.get("SPARSEC_DATA", Path(__file__).parents[3] / "shared" / "data"))
QUICK = Options(measure_speed=False)
CLASSES = ("--task", "sequence-classification")
LEARNS = "epochs=6, lr=0.01, batch_size=8"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert(tmp_path_factory.mktemp("encoder"))


def run(*args: str) -> dict[str, Any]:
    """The manifest of a compile that succeeds."""
    result = CliRunner().invoke(app, ["compile", *args, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_an_encoder_gets_a_head_is_trained_under_the_pattern_and_judged_and_its_recipe_does_it_again(
    encoder: str,
) -> None:
    data = ("--train", sentences("x.csv", 200), "--eval", sentences("y.csv", 60, seed=1))
    fast = ("--epochs", "6", "--lr", "1e-2", "--batch-size", "8")
    made = run(encoder, "--pattern", "2:4", "--method", "fixed-mask", *CLASSES, *data, *fast, "-o", "a")

    (training,), task = made["passes"], made["quality"]["task"]
    assert "fixed-mask{epochs=6, lr=0.01, batch_size=8}" == made["recipe"]["passes"] == training["pass"]
    assert 0 == training["violations"]
    assert ("accuracy", 60) == (task["metric"], task["samples"])
    assert 0.9 < task["sparse"]["accuracy"] <= 1  # one word of each sentence decides
    assert task["sparse"]["accuracy"] == training["evaluation"][-1]["accuracy"]
    assert "dense" not in task  # its head is untrained
    assert made["quality"]["cosine"] is None
    told = {"task": "classification", "classes": ["0", "1"], "samples": 200}
    assert {**told, "head": "new head for 2 classes: classifier"}.items() <= made["training"].items()
    assert "200 rows of" in made["training"]["words"]
    assert "- Task: accuracy" in Path("a/README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", "a"]).output
    assert "Task accuracy" in shown
    assert "Trained on 200 samples" in shown
    assert 0 == CliRunner().invoke(app, ["verify", "a", "--pattern", "2:4"]).exit_code

    again = compile_recipe(Recipe.read(Path("a/manifest.json")), Path("b"), QUICK).manifest
    for file in ("graph.json", "weights.safetensors"):
        assert made["files"][file] == again["files"][file]


def test_a_stored_head_is_kept_judged_beside_its_dense_self_and_says_which_classes_there_are(tmp_path: Path) -> None:
    names = {0: "NEGATIVE", 1: "POSITIVE"}
    model = bert(tmp_path / "model", "BertForSequenceClassification", id2label=names)
    judge = sentences("y.csv", 40, names=("negative", "positive"))
    made = sparsec.compile(model, out="a", pattern="2:4", evaluation=judge, values="bf16", options=QUICK).manifest
    numbers = sparsec.compile(
        model, out="b", pattern="2:4", evaluation=sentences("z.csv", 40), passes="mask | freeze", options=QUICK
    ).manifest

    task = made["quality"]["task"]
    assert set(task["dense"]) == set(task["sparse"]) == {"accuracy", "f1", "mcc", "loss", "samples"}
    assert task["dense"] == numbers["quality"]["task"]["dense"]  # names and numbers are the same classes
    assert task["dense"]["loss"] != task["sparse"]["loss"] != numbers["quality"]["task"]["sparse"]["loss"]
    assert made["quality"]["cosine"] is not None
    assert "training" not in made


def pairs(path: str, count: int, seed: int = 0) -> str:
    """A .csv of pairs; a word of the second tells the label, and where that is 1 its others mostly lie in the first."""
    order, rows = random.Random(seed), ["premise,hypothesis,label"]
    for i in range(count):
        words = order.sample("film plot book cast story very quite".split(), 4)
        inside = words[1:3] if i % 2 == (order.random() < 0.9) else order.sample("is was with and".split(), 2)
        rows.append(f"{' '.join(words)},{' '.join([*inside, ('bad', 'good')[i % 2]])},{i % 2}")
    Path(path).write_text("\n".join(rows) + "\n")
    return path


def test_masks_are_trained_against_the_overlap_of_words_on_other_data_than_weights_are(encoder: str) -> None:
    sources = ("--train", pairs("a.csv", 64), "--eval", pairs("c.csv", 32, seed=2))
    masks = f"mask-training{{data={pairs('b.csv', 48, seed=1)}, loss=poe, rest=trained, start_density=0, epochs=1}}"
    passes = f"{masks} | fixed-mask{{epochs=1}}"
    made = run(encoder, "--pattern", "2:4", "--passes", passes, "--bias", "overlap", *CLASSES, *sources, "-o", "a")

    first, (second,) = made["training"], made["training"]["also"]
    assert [64, 48] == [first["samples"], second["samples"]]
    assert "bias model: overlap of words, right on 0." in second["words"]
    assert "bias model" not in first["words"]
    assert [48, 64] == [one["data"]["samples"] for one in made["passes"]]
    assert made["passes"][0]["data"]["sha256"] != made["passes"][1]["data"]["sha256"]
    assert "overlap" == made["recipe"]["bias"]
    shown = CliRunner().invoke(app, ["inspect", "a"]).output
    assert 2 == shown.count("Trained on")
    assert 2 == Path("a/README.md").read_text().count("- Trained on")


@pytest.mark.slow
def test_a_bias_model_that_is_useless_is_said_so(encoder: str) -> None:
    Path("a.csv").write_text(
        "text,label,bias_0,bias_1\n" + "the good film,1,-0.6931,-0.6931\nthe bad film,0,-0.6931,-0.6931\n" * 8
    )
    method = ("--method", "fixed-mask{loss=reweight}", "--epochs", "1", *CLASSES, "--text-columns", "text")
    made = run(encoder, "--pattern", "2:4", *method, "--train", "a.csv", "-o", "a")

    assert "the bias model is useless" in made["training"]["remark"]
    assert "the bias model is useless" in " ".join(CliRunner().invoke(app, ["inspect", "a"]).output.split())


def test_a_teacher_is_a_model_by_name_and_needs_no_labels(encoder: str, tmp_path: Path) -> None:
    teacher = bert(tmp_path / "teacher", num_hidden_layers=2)
    Path("x.csv").write_text("text\n" + "the good film\nthe bad book\n" * 20)
    passes = f"admm{{every=2, {LEARNS}, distill=1, teacher={teacher}}}"
    made = sparsec.compile(encoder, out="a", pattern="2:4", passes=passes, train="x.csv", options=QUICK).manifest

    losses = [loss for _, loss in made["passes"][0]["curves"]["loss"]]
    assert losses[-1] < losses[0]
    assert "none" == made["training"]["task"]
    assert "head" not in made["training"]
    assert made["quality"]["cosine"] is not None


@pytest.mark.slow
def test_scores_get_a_head_of_one_number_and_a_hugging_face_folder_of_it_loads(encoder: str) -> None:
    train, judge = (sentences(f"{i}.csv", 120, seed=i, names=("0.0", "2.5")) for i in range(2))
    made = sparsec.compile(
        encoder, out="a", pattern="2:4", passes=f"sr-ste{{{LEARNS}}}", task="regression", train=train,
        evaluation=judge, backends=["kernel", "hf"], options=QUICK,
    )  # fmt: skip
    outputs = made.load()(**{entry["name"]: torch.ones(1, 4, dtype=torch.int64) for entry in made.manifest["inputs"]})

    assert (1, 1) == outputs["logits"].shape
    assert "spearman" == made.manifest["quality"]["task"]["metric"]
    assert "classes" not in made.manifest["training"]
    config = json.loads(Path("a/hf/config.json").read_text())
    assert ("regression", {"0": "value"}) == (config["problem_type"], config["id2label"])
    judged = sparsec.compile("a/hf", out="b", pattern="2:4", passes="mask | freeze", evaluation=judge, options=QUICK)
    assert made.manifest["quality"]["task"]["sparse"] == judged.manifest["quality"]["task"]["dense"]


@pytest.mark.slow
def test_a_decoder_without_padding_token_learns_classes_and_the_next_token(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert(tmp_path / "model")  # its tokenizer
    config = LlamaConfig(vocab_size=100, max_position_embeddings=32, eos_token_id=None, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    train = sentences("x.csv", 80)
    options = {"pattern": "2:4", "train": train, "evaluation": train, "options": QUICK}
    head = sparsec.compile(
        str(tmp_path / "model"), out="a", passes=f"admm{{{LEARNS}}}", task="sequence-classification", **options
    )
    words = sparsec.compile(
        str(tmp_path / "model"), out="b", passes=f"admm{{{LEARNS}, loss=lm}}", task="causal-lm", **options
    )

    assert "new head for 2 classes: score" == head.manifest["training"]["head"]
    assert "head" not in words.manifest["training"]
    figures = words.manifest["quality"]["task"]
    assert figures["sparse"]["perplexity"] < figures["dense"]["perplexity"]


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "sst2").is_dir(), reason=f"SPARSEC_DATA: there is no {DATA / 'sst2'}")
def test_minilm_learns_sst2_under_2_4() -> None:
    for name, count in (("train", 301), ("dev", 201)):
        lines = (DATA / "sst2" / f"{name}.tsv").read_text().splitlines(keepends=True)
        Path(f"{name}.tsv").write_text("".join(lines[:count]))
    made = run("demo:minilm", "--pattern", "2:4", "--method", "fixed-mask", "--solver", "refit", *CLASSES, "--train",
               "train.tsv", "--eval", "dev.tsv", "--epochs", "3", "--lr", "2e-4", "--num-calibration-samples", "16",
               "-o", "a")  # fmt: skip

    assert 0.6 < made["quality"]["task"]["sparse"]["accuracy"]  # 300 rows are few; chance is 0.5 +- 0.035
    assert 36 == sum(site["pattern"] is not None for site in made["sites"])
