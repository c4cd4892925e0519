"""Bad input: one paragraph that says what was found, what was expected and what to do; exit 1 or 2; nothing written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from task_models import WORDS, bert, sentences
from typer.testing import CliRunner

from sparsec.cli import app

BAD_PATTERNS = ["3:2", "64:2", "banana", "0:4", "64:3:8", "64:2:3", "2:300", "unstructured:1.5"]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def refuse(code: int, *args: str) -> str:
    """Run a command that must fail; returns its one paragraph."""
    before = sorted(os.listdir())
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, result.output
    assert sorted(os.listdir()) == before
    text = result.stderr.strip()
    assert text.startswith("sparsec: ")
    assert len(text.splitlines()) == 1
    return text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig, BertModel

    path = tmp_path_factory.mktemp("model")
    sizes = {
        "vocab_size": 20,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    BertModel(BertConfig(**sizes, max_position_embeddings=16)).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("pattern", BAD_PATTERNS)
def test_a_pattern_that_cannot_be(pattern: str) -> None:
    assert pattern in refuse(2, "compile", "demo:minilm", "--pattern", pattern, "-o", "x")


@pytest.mark.parametrize("option", [("--drop-slow",), ("--tokens", "1-512")])
def test_int8_weights_have_no_dense_kernel_to_choose(model: str, option: tuple[str, ...]) -> None:
    said = refuse(2, "compile", model, "--pattern", "4:2:4", "--values", "int8", *option, "-o", "x")
    assert f"{option[0]} compares with a dense kernel" in said


def test_a_model_path_that_is_not_there() -> None:
    assert "no folder here" in refuse(2, "compile", "/nowhere/at/all", "--pattern", "2:4", "-o", "x")


def test_a_hub_id_that_no_hub_gives() -> None:
    assert "neither here nor from a hub" in refuse(2, "compile", "nobody/nothing", "--pattern", "2:4", "-o", "x")


def test_a_folder_without_config() -> None:
    Path("empty").mkdir()

    assert "config.json" in refuse(2, "compile", "empty", "--pattern", "2:4", "-o", "x")


def test_corrupt_weights(model: str) -> None:
    Path("corrupt").mkdir()
    Path("corrupt/config.json").write_bytes(Path(model, "config.json").read_bytes())
    Path("corrupt/model.safetensors").write_bytes(b"\x93" * 500)

    assert "weights cannot be loaded" in refuse(2, "compile", "corrupt", "--pattern", "2:4", "-o", "x")


def test_an_architecture_nobody_knows() -> None:
    Path("odd").mkdir()
    Path("odd/config.json").write_text('{"architectures": ["FooModel"], "model_type": "bert"}')

    assert "FooModel" in refuse(2, "compile", "odd", "--pattern", "2:4", "-o", "x")


@pytest.mark.parametrize(("option", "value"), [("--layer", "re:nope=2:4"), ("--ignore", "re:nope")])
def test_a_selector_that_matches_nothing(model: str, option: str, value: str) -> None:
    assert "matches none of the 7 sites" in refuse(2, "compile", model, "--pattern", "2:4", option, value, "-o", "x")


def test_a_selector_that_is_no_regular_expression(model: str) -> None:
    assert "regular expression" in refuse(2, "compile", model, "--pattern", "2:4", "--ignore", "re:(", "-o", "x")


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("msk | freeze", "did you mean mask"),
        ("mask{colums=l1} | freeze", "there is no option 'colums'"),
        ("mask{columns=best} | freeze", "columns"),
        ("mask{columns=l1 | freeze", "expected ',' or '}'"),
        ("freeze", "requires a program that is masked"),
        ("mask", "must be frozen"),
        ("mask | freeze | lower", "must be frozen, not lowered"),
    ],
)
def test_passes_that_cannot_work(model: str, passes: str, expected: str) -> None:
    assert expected in refuse(2, "compile", model, "--pattern", "2:4", "--passes", passes, "-o", "x")


def test_an_output_that_exists(model: str) -> None:
    Path("x").mkdir()

    assert "--force" in refuse(2, "compile", model, "--pattern", "2:4", "-o", "x")
    assert "not written by sparsec" in refuse(2, "compile", model, "--pattern", "2:4", "-o", "x", "--force")


@pytest.mark.parametrize("out", ["file/x", "/proc/x"])
def test_an_output_that_cannot_be_written(model: str, out: str) -> None:
    Path("file").touch()

    assert "cannot be written" in refuse(2, "compile", model, "--pattern", "2:4", "-o", out)


def test_sites_that_would_silently_stay_dense(model: str) -> None:
    assert "silently stay dense" in refuse(2, "compile", model, "--layer", "re:query=2:4", "-o", "x")


def test_no_pattern_no_model_and_unknown_backend(model: str) -> None:
    assert "needs a pattern" in refuse(2, "compile", model, "-o", "x")
    assert "needs a MODEL" in refuse(2, "compile", "--pattern", "2:4", "-o", "x")
    assert "unknown backend" in refuse(2, "compile", model, "--pattern", "2:4", "--backend", "onx", "-o", "x")


def test_a_pt2_file_without_trust() -> None:
    Path("model.pt2").write_bytes(b"PK")

    assert "--trust" in refuse(2, "compile", "model.pt2", "--pattern", "2:4", "-o", "x")
    assert "cannot be read" in refuse(2, "compile", "model.pt2", "--pattern", "2:4", "-o", "x", "--trust")


def test_a_function_that_is_not_there_or_returns_nonsense() -> None:
    assert "package.module:function" in refuse(2, "compile", "no_such_module:make", "--pattern", "2:4", "-o", "x")
    assert "expected (model, example_inputs)" in refuse(2, "compile", "os:getcwd", "--pattern", "2:4", "-o", "x")


def test_recipes_with_unknown_keys_or_no_yaml(model: str) -> None:
    Path("r.yaml").write_text(f"model: {model}\ntargets: {{'*': '2:4'}}\nspeed: fast\n")
    assert "speed" in refuse(2, "compile", "--recipe", "r.yaml", "-o", "x")
    Path("r.yaml").write_text("model: [")
    assert "not YAML" in refuse(2, "compile", "--recipe", "r.yaml", "-o", "x")
    assert "cannot be read" in refuse(2, "compile", "--recipe", "missing.yaml", "-o", "x")


def test_a_recipe_with_yaml_tags() -> None:
    Path("r.yaml").write_text("model: !!python/object/apply:os.system ['touch owned']\ntargets: {'*': '2:4'}\n")

    assert "line 1: found the YAML tag !!python/object/apply:os.system" in refuse(2, "compile", "--recipe", "r.yaml")


def test_a_recipe_with_a_selector_that_is_no_regular_expression() -> None:
    Path("r.yaml").write_text("model: /nowhere\ntargets: {'re:(fc': '2:4'}\n")

    assert "target 're:(fc' is not a regular expression" in refuse(2, "compile", "--recipe", "r.yaml", "-o", "x")


# Training -------------------------------------------------------------------------------------------------------------

ADMM = ("--pattern", "2:4", "--method", "admm", "-o", "x", "--train")
NAMED = ("--task", "sequence-classification")


@pytest.fixture
def train(tmp_path: Path) -> str:
    return sentences(str(tmp_path / "train.csv"), 20)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bert(tmp_path_factory.mktemp("encoder"))


def test_a_method_that_is_none_and_options_that_cannot_be(model: str, train: str) -> None:
    asked = ("compile", model, "--pattern", "2:4", "-o", "x", "--train", train)

    assert "the methods are fixed-mask, admm" in refuse(2, *asked, "--method", "adam")
    assert "--epochs 0: expected" in refuse(2, *asked, "--method", "admm", "--epochs", "0")
    assert "--lr 0: expected" in refuse(2, *asked, "--method", "admm", "--lr", "0")
    assert "--epochs goes with --method" in refuse(2, *asked, "--epochs", "3")
    assert "no pass trains" in refuse(2, *asked)
    assert "add --train DATA" in refuse(2, *asked[:-2], "--method", "admm")
    assert "task: Input should be" in refuse(2, *asked, "--method", "admm", "--task", "sing")


def test_an_onnx_file_is_not_trained(train: str) -> None:
    assert "--train needs a model that sparsec can trace" in refuse(2, "compile", "/nowhere/x.onnx", *ADMM, train)


def test_training_data_that_are_not_there(model: str, train: str, tmp_path: Path) -> None:
    assert "there is no such file" in refuse(2, "compile", model, *ADMM, "missing.csv")
    assert "no column 'y' (--label-column)" in refuse(2, "compile", model, *ADMM, train, "--label-column", "y")
    other = sentences(str(tmp_path / "other.csv"), 9, names=("0", "1", "2"))
    assert "found the label '2', expected one of the 2 classes" in refuse(
        2, "compile", model, *ADMM, train, "--eval", other, *NAMED
    )


def test_labels_and_a_model_without_a_head_for_them(model: str, train: str) -> None:
    assert "add --task sequence-classification for a new head" in refuse(2, "compile", model, *ADMM, train)
    said = refuse(2, "compile", model, "--pattern", "2:4", "-o", "x", "--eval", train, *NAMED)
    assert "no labels to train it with" in said


def test_labels_beyond_the_classes_of_a_head(train: str, tmp_path: Path) -> None:
    model = bert(tmp_path / "three", "BertForSequenceClassification", num_labels=3)
    other = sentences(str(tmp_path / "other.csv"), 9, names=("0", "1", "7"))

    assert "found the label '7', expected one of the 3 classes" in refuse(2, "compile", model, *ADMM, other)


def test_a_new_head_has_no_dense_original_to_be_compared_with(encoder: str, train: str) -> None:
    said = refuse(2, "compile", encoder, *ADMM, train, *NAMED, "--min-quality", "0.5")

    assert "judge by --eval" in said


@pytest.mark.slow
def test_a_teacher_that_is_none_or_knows_other_words_or_has_another_head(
    encoder: str, train: str, tmp_path: Path
) -> None:
    asked = ("compile", encoder, *ADMM, train, "--task", "none", "--teacher")
    other = bert(tmp_path / "words", words=[*WORDS[:5], *reversed(WORDS[5:])])
    wide = bert(tmp_path / "wide", hidden_size=32)

    assert "teacher: MODEL '/nowhere'" in refuse(2, *asked, "/nowhere")
    assert "has another vocabulary" in refuse(2, *asked, other)
    assert "must have the same head" in refuse(2, *asked, wide)


@pytest.mark.parametrize("command", ["verify", "inspect", "bench"])
def test_paths_that_hold_nothing(command: str) -> None:
    Path("empty").mkdir()

    assert refuse(2, command, "nowhere")
    assert "empty" in refuse(1 if command == "bench" else 2, command, "empty")


def test_an_error_is_one_json_object_too(model: str) -> None:
    result = CliRunner().invoke(app, ["compile", model, "--pattern", "3:2", "-o", "x", "--json"])

    assert result.exit_code == 2
    assert '"exit_code": 2' in result.stdout
