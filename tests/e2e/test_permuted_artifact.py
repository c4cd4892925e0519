"""Permuted models from the outside: tables that lead back to the weights, and Hugging Face models that load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import made, random
from torch import nn
from typer.testing import CliRunner

import sparsec
from sparsec import PassManager, api, trace
from sparsec.cli import app
from sparsec.layout import decompress
from sparsec.lowered import packed_calls
from sparsec.pipeline import CLOSE, relative_difference
from sparsec.program import read_graph
from sparsec.recipe import Recipe

QUICK = api.Options(measure_speed=False)


def feed() -> nn.Module:
    return made(lambda: nn.Sequential(nn.Linear(14, 50), nn.GELU(), nn.Linear(50, 37), nn.ReLU(), nn.Linear(37, 3)))


def test_tables_of_strips_lead_back_to_the_masked_weights_bit_for_bit(tmp_path: Path) -> None:
    net, inputs, passes = feed(), [random(6, 14)], "permute{mode=kernel, pattern=16:2:8} | mask | freeze"
    artifact = sparsec.compile(net, inputs, passes=passes, out=tmp_path / "a", options=QUICK)
    expected = PassManager.parse(passes).run(trace(net, inputs))

    assert all(check.ok for check in artifact.verify())
    layouts = {call.site: call.layout for call in packed_calls(read_graph(artifact.root))}
    assert {"0.weight", "2.weight"} == layouts.keys()
    for name, layout in layouts.items():
        original, found = net.get_parameter(name)[None], decompress(layout)
        assert layout.rows is not None, name
        assert torch.equal(expected.sites[name].read(expected.module), found)
        assert torch.equal(torch.where(found != 0, original, 0), found)  # what is kept stands where it stood


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT whose head leaves every width free."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    path = tmp_path_factory.mktemp("origin")
    BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes)).save_pretrained(path)
    return path


def test_the_model_holds_permuted_weights_and_computes_the_same(origin: Path, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model, same = (BertForSequenceClassification.from_pretrained(origin).eval() for _ in range(2))
    tokens = {"input_ids": torch.arange(12).view(2, 6)}
    PassManager.parse("permute{pattern=2:4, rounds=1}").run(trace(model, tokens)).write_back(model)
    model.save_pretrained(tmp_path / "permuted")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "permuted").eval()

    table, moved = (one.bert.embeddings.word_embeddings.weight for one in (same, again))
    assert not torch.equal(table, moved)
    assert torch.equal(table.sort(1).values, moved.sort(1).values)  # the same channels in another order
    with torch.no_grad():
        assert relative_difference(again(**tokens).logits, same(**tokens).logits) <= CLOSE


@pytest.mark.parametrize(
    ("mode", "pattern"), [("graph", "2:4"), pytest.param("both", "16:2:8@strip", marks=pytest.mark.slow)]
)
def test_all_backends_hold_the_same_permuted_weights(origin: Path, mode: str, pattern: str, tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    passes = f"permute{{mode={mode}, rounds=1}} | mask | freeze"
    data = {"model": str(origin), "targets": {"*": pattern.partition("@")[0]}, "passes": passes}
    artifact = api.compile_recipe(Recipe.from_data({**data, "backends": ["kernel", "hf"]}), tmp_path / "a", QUICK)
    model = BertForSequenceClassification.from_pretrained(tmp_path / "a/hf").eval()

    assert all(check.ok for check in artifact.verify())
    assert {pattern} == {site["pattern"] for site in artifact.manifest["sites"] if site["pattern"]}
    tokens = {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    with torch.no_grad():
        assert relative_difference(artifact.load()(**tokens)["logits"], model(**tokens).logits) <= CLOSE


@pytest.mark.slow
def test_what_a_user_sees(origin: Path, tmp_path: Path) -> None:
    options = ["--pattern", "16:2:8", "--solver", "none", "-o", str(tmp_path / "a"), "--permute"]
    result = CliRunner().invoke(app, ["compile", str(origin), *options, "kernel"])

    assert 0 == result.exit_code, result.output
    text = " ".join(result.output.split())
    assert "permuted kept before kept after bert.encoder.layer.0.attention.self.query 0.4" in text
    assert "Permuted mode kernel, in" in text
    assert "before, on average over 6 sites" in text
