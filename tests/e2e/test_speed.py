"""`sparsec explain` and `sparsec select` from the outside, on a small BERT; nothing is measured but the dense graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sparsec import Recipe, show
from sparsec.backends.kernel import cost
from sparsec.cli import app


@pytest.fixture(autouse=True)
def _no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(show.out, "width", 140)  # which COLUMNS sets when it is first imported, maybe by another test
    monkeypatch.setattr(cost, "calibrate", lambda *_: None)
    cost._table_for.cache_clear()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    path = tmp_path_factory.mktemp("model")
    BertModel(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)).save_pretrained(path)
    return str(path)


def run(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(args))
    assert code == result.exit_code, result.output + str(result.exception)
    return result.stdout if code == 0 else result.stderr


def as_json(*args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json"))
    return found


def test_explain_compares_patterns_by_role_and_says_what_limits(model: str) -> None:
    text = " ".join(run("explain", model, "--tokens", "2,40").split())

    for part in (
        "attention.query/key/value/output 8 64x64",
        "64:2:16",
        "pooler.dense.weight dense: the pooler",
        "the most that any pattern can give",
        "model: kernels were not measured here",
    ):
        assert part in text


def test_explain_as_data_has_every_site_and_the_asked_pattern_only(model: str) -> None:
    found = as_json("explain", model, "--pattern", "2:4", "--ignore", "re:query", "--tokens", "8")

    assert 13 == len(found["sites"])
    assert [("2:4", 8)] == [(row["variant"], row["tokens"]) for row in found["whole"]]
    ignored = [site for site in found["sites"] if "query" in site["name"]]
    assert {"ignored by 're:query'"} == {site["variants"]["2:4"]["reason"] for site in ignored}


def test_explain_can_time_the_real_shapes_and_list_every_site(model: str) -> None:
    text = run("explain", model, "--pattern", "2:4", "--tokens", "4", "--measure", "--sites")

    assert "(measured," in text
    assert 12 == text.count("encoder.layer.")


def test_a_backend_without_sparse_kernels_says_so_for_every_site(model: str) -> None:
    found = as_json("explain", model, "--pattern", "2:4", "--tokens", "8", "--backend", "onnx{weights=dense}")

    assert [1.0] == [row["speed"] for row in found["whole"]]
    assert 12 == sum("onnxruntime has no kernel" in site["variants"]["2:4"]["reason"] for site in found["sites"])
    assert "100 % of the time is outside the sites" in found["words"]


@pytest.mark.slow
def test_explain_takes_an_artifact_for_its_model_and_patterns(model: str, tmp_path: Path) -> None:
    run("compile", model, "--pattern", "1:4", "-o", str(tmp_path / "a.sparsec"))
    found = as_json("explain", str(tmp_path / "a.sparsec"), "--tokens", "4")

    assert {"1:4", None} == {site["variants"]["as asked"]["pattern"] for site in found["sites"]}


def test_select_writes_a_recipe_that_compile_takes(model: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = run("select", model, "--speedup", "1.02", "--tokens", "32", "--patterns", "2:4,16:2:8", "-o", str(recipe))

    assert "predicted at 32 tokens" in " ".join(text.split())
    assert model == Recipe.read(recipe).model
    assert "'*'" in run("compile", "--recipe", str(recipe), "--dry-run")


def test_select_under_a_density_tells_other_budgets_and_draws_them(model: str, tmp_path: Path) -> None:
    plot = tmp_path / "front.svg"
    args = ("select", model, "--density", "0.4", "--layer", "re:query=2:8", "--plot", str(plot))
    found, text = as_json(*args), " ".join(run(*args).split())

    assert found["density"] <= 0.4
    assert all("query" not in name for name in found["patterns"])
    assert "2:8" == found["recipe"]["targets"]["re:query"]
    assert {"density", "retained", "patterns"} == found["front"][0].keys()
    assert "% of the weights stay" in text
    assert "what other budgets would give" in text
    assert "retained score" in plot.read_text()


@pytest.mark.parametrize("objective", ["reconstruction", "sensitivity"])
def test_select_can_look_at_calibration_data(model: str, tmp_path: Path, objective: str) -> None:
    data = tmp_path / "ids.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [i, 7, 3, 9, 4, 2]}) + "\n" for i in range(8)))
    args = ("--objective", objective, "--calib", str(data), "--num-calibration-samples", "8")
    found = as_json("select", model, "--budget", "density=0.5", "--patterns", "2:4,1:4", *args)

    key = "error" if objective == "reconstruction" else "retained_sensitivity"
    assert 0 < found[key] < 1
    assert str(data) == found["recipe"]["calib"]


def test_select_by_the_paper_tells_what_it_weighed(model: str) -> None:
    args = ("select", model, "--density", "0.3", "--mode", "paper")  # the pooler counts, and stays

    assert {"16:2:8", "32:2:8", "64:2:8", "128:2:8"} == as_json(*args)["considered"].keys()
    assert "64:2:8 0.2323" in " ".join(run(*args).split())


def test_target_speedup_is_shorthand_for_a_choice(model: str) -> None:
    args = ("compile", model, "--target-speedup", "1.02", "--layer", "re:query=2:8", "--tokens", "32", "--dry-run")
    found = as_json(*args)

    assert "choose-vm{speedup=1.02, tokens=32, objective=reconstruction} | oneshot" == found["passes"]
    assert "choose-vm{speedup=1.02, tokens=32} | mask | freeze" == as_json(*args, "--solver", "none")["passes"]
    assert {"re:query": "2:8"} == found["targets"]


def test_a_compile_for_a_speedup_stores_what_was_chosen(model: str, tmp_path: Path) -> None:
    out = tmp_path / "a.sparsec"
    args = ("--target-speedup", "1.02", "--score", "magnitude", "--ignore", "re:query", "-o", str(out))
    run("compile", model, *args)
    stored = Recipe.read(out / "manifest.json")

    assert "choose-vm" not in stored.passes
    assert "ignore" == stored.targets["re:query"]
    assert any(text != "ignore" for text in stored.targets.values())


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (("explain", "MODEL", "--tokens", "1,x"), 2, "expected numbers from 1 up"),
        (("explain", "MODEL", "--values", "fp64"), 2, "expected fp32, bf16, int8"),
        (("explain", "MODEL", "--pattern", "3:2"), 2, "N is the number kept"),
        (("select", "MODEL", "--speedup", "900"), 1, "900x cannot be reached: the most is"),
        (("select", "MODEL", "--speedup", "1"), 2, "expected a number above 1"),
        (("select", "MODEL"), 2, "expected one budget: --speedup 1.5"),
        (("select", "MODEL", "--speedup", "2", "--density", "0.5"), 2, "found speedup 2.0, density 0.5"),
        (("select", "MODEL", "--budget", "density=much"), 2, "'much' is no number"),
        (("select", "MODEL", "--density", "0.5", "--objective", "luck"), 2, "expected retained or reconstruction"),
        (("select", "MODEL", "--density", "0.5", "-o", "/nowhere/r.yaml"), 2, "cannot be written; expected a file"),
        (("select", "MODEL", "--density", "0.5", "--mode", "paper", "--plot", "a.svg"), 2, "leave --plot out"),
        (("select", "MODEL", "--density", "0.5", "--patterns", "2:4,x"), 2, "'x' cannot be read"),
        (("compile", "MODEL", "--pattern", "2:4", "--target-speedup", "2"), 2, "give one of them"),
        (("compile", "MODEL", "--target-speedup", "0.5"), 2, "expected a number above 1"),
        (("compile", "MODEL"), 2, "--target-speedup 1.5, or a --recipe"),
        (("compile", "MODEL", "--pattern", "2:4", "--tokens", "9-1"), 2, "expected LOW-HIGH such as 1-512"),
        (("compile", "MODEL", "--passes", "mask{pattern=2:4} | freeze", "--drop-slow"), 2, "--drop-slow must know"),
    ],
)
def test_bad_requests_say_what_was_expected(args: tuple[str, ...], code: int, part: str, model: str) -> None:
    assert part in run(*(model if one == "MODEL" else one for one in args), code=code)
