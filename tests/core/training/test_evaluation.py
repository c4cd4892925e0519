"""Judging on the way changes nothing, judges what would be kept, and the best epoch can be what is left."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from core.training.together import Normed, traced
from torch import Tensor
from training_models import METHODS, context, run, task, wide

from sparsec.errors import RecipeError, UsageError
from sparsec.pipeline import PassManager, PassReport
from sparsec.program import Program
from sparsec.training import evaluation, metrics
from sparsec.training.evaluation import Evaluator
from sparsec.training.labelled import Labelled
from sparsec.training.loop import Loop

HELD = task(64, 32)[1:]
OPTIONS = "pattern=2:4, lr=0.01, weight_decay=0.1"
every_method = pytest.mark.parametrize("name", METHODS)


def judged(program: Program) -> dict[str, float]:
    """The figures of a program as it stands."""
    return metrics.evaluate(lambda **inputs: program(**inputs), HELD, "classification")


def trained(name: str, options: str = "", held: Any = HELD, program: Program | None = None) -> tuple[Program, Any]:
    done, report = run(f"{METHODS[name]}, {OPTIONS}{options}}}", program or wide(), context(eval=held))
    return done, report.data


@every_method
def test_judging_changes_no_bit_of_the_training(name: str) -> None:
    found, data = trained(name)
    plain, report = run(f"{METHODS[name]}, {OPTIONS}}}")

    assert plain.dump(hashes=True) == found.dump(hashes=True)
    assert report.data == {key: value for key, value in data.items() if key != "evaluation"}
    assert [6, 12] == [figures["step"] for figures in data["evaluation"]]


@every_method
@pytest.mark.parametrize("keep", ["last", "best"])
def test_what_was_judged_is_what_is_left(name: str, keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last epoch made the worst by force, `best` leaves the first: its figures, exactly."""
    plain = metrics.evaluate
    found: list[dict[str, float]] = []

    def evaluate(run: Any, batches: Any, task: Any) -> dict[str, float]:
        found.append(plain(run, batches, task))
        return {**found[-1], "accuracy": float(-len(found))}

    monkeypatch.setattr(evaluation.metrics, "evaluate", evaluate)
    done, data = trained(name, f", keep={keep}")
    monkeypatch.undo()

    assert (found[0] if keep == "best" else found[1]) == judged(done)
    assert found[0]["loss"] != found[1]["loss"]
    assert (6 if keep == "best" else None) == data.get("kept_step")
    for site in done.sites.sparse:
        assert site.selection is not None and site.pattern is not None
        weight = site.read(done.module)
        assert 0 == site.pattern.violations_of(weight, site.selection).count
        assert not weight[~site.pattern.mask(site.selection, site.shape[2])].any()


def test_the_statistics_of_the_best_epoch_are_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []
    run_one = Evaluator.run

    def noted(self: Evaluator, loop: Loop) -> dict[str, float]:
        figures = run_one(self, loop)
        seen.append({key: value.clone() for key, value in loop.tensors().items() if "running" in key})
        return figures

    monkeypatch.setattr(Evaluator, "run", noted)
    monkeypatch.setattr(Evaluator, "best", property(lambda self: 0))
    done, _ = trained("sr-ste", ", keep=best", program=traced(Normed))

    buffers = dict(done.module.named_buffers())
    assert len(seen) == 2 and seen[0]
    for name, value in seen[0].items():
        kept = buffers[name.removeprefix("graph.")]
        assert torch.equal(value, kept) and not torch.equal(seen[1][name], kept)


@pytest.mark.parametrize(
    ("main", "values", "expected"),
    [("accuracy", [0.5, 0.9, 0.9, 0.1], 1), ("perplexity", [9.0, float("inf"), 3.0, 3.0], 2)],
)
def test_the_first_of_the_best_is_best(main: str, values: list[float], expected: int) -> None:
    made = Evaluator(evaluation.Held((), "lm" if main == "perplexity" else "classification", ""))
    made.found = [{"step": float(i), main: value} for i, value in enumerate(values)]

    assert expected == made.best


def test_labelled_data_say_what_they_are_judged_by() -> None:
    """The labels are classes here, but the data call them scores."""
    scores = [{"x": batch["x"], "labels": batch["x"][:, :3].clone()} for batch in HELD]
    labelled = Labelled(tuple(scores), "words", "hash", 32, "regression", ())
    _, data = trained("fixed-mask", held=lambda: labelled)

    assert ["step", "spearman", "pearson", "loss", "samples"] == list(data["evaluation"][0])


def test_the_figures_are_those_of_the_whole_data_in_batches_of_any_size() -> None:
    whole = [{key: torch.cat([batch[key] for batch in HELD]) for key in HELD[0]}]

    assert trained("fixed-mask")[1]["evaluation"] == trained("fixed-mask", held=whole)[1]["evaluation"]


@pytest.mark.parametrize(
    ("options", "held", "error", "message"),
    [
        (", keep=best", None, UsageError, "keep=best needs data to judge by: give --eval DATA"),
        ("", [{"x": HELD[0]["x"]}], UsageError, "pass fixed-mask: eval: there are no labels to judge by"),
        ("", [{"y": HELD[0]["x"]}], UsageError, "eval: batch 0 has y"),
        (", keep=first", HELD, RecipeError, "keep"),
        (", log_every=0", HELD, RecipeError, "log_every is 0"),
        (", save_seconds=-1", HELD, RecipeError, "save_seconds is -1"),
        (", precision=fp8", HELD, RecipeError, "precision"),
    ],
)
def test_what_cannot_be_judged_or_kept_is_refused(options: str, held: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trained("fixed-mask", options, held)


# Log ------------------------------------------------------------------------------------------------------------------


def logged(path: Path, text: str, **resources: Any) -> tuple[list[dict[str, Any]], tuple[PassReport, ...]]:
    reports = PassManager.parse(text).run_reported(wide(), context(log=path, **resources))[1]
    file = path / "training.jsonl" if path.is_dir() else path
    return [json.loads(line) for line in file.read_text().splitlines()], reports


def test_a_log_has_the_losses_and_curves_of_the_report(tmp_path: Path) -> None:
    lines, (report,) = logged(tmp_path / "log.jsonl", f"{METHODS['admm']}, {OPTIONS}, log_every=4}}", eval=HELD)
    curves = report.data["curves"]

    assert [4, 6, 8, 12, 12] == [line["step"] for line in lines]
    steps = [line for line in lines if "evaluation" not in line]
    for line in steps:
        losses = [loss for step, loss in curves["loss"] if line["step"] - 4 < step <= line["step"]]
        assert pytest.approx(sum(losses) / 4) == line["loss"]
        assert next(value for step, value in curves["primal"] if step == line["step"]) == line["primal"]
        assert line["grad_norm"] > 0 and line["samples_per_second"] > 0 and line["epoch"] == round(line["step"] / 6, 3)
    assert [0.01 * (12 - step + 1) / 12 for step in (4, 8, 12)] == pytest.approx([line["lr"] for line in steps])
    figures = report.data["evaluation"]
    assert figures == [{"step": line["step"], **line["evaluation"]} for line in lines if "evaluation" in line]


def test_a_log_is_taken_up_where_a_checkpoint_is_and_passes_share_it(tmp_path: Path) -> None:
    """Lines after the step are of a run that was killed: they come again, once."""
    path, text = tmp_path / "log.jsonl", f"{METHODS['sr-ste']}, {OPTIONS}, log_every=1}}"
    expected, _ = logged(path, f"{text} | fixed-mask{{epochs=1, log_every=3}}")
    with path.open("a") as file:
        file.write('{"pass": "sr-ste-0", "st')
    found, _ = logged(path, f"{text} | fixed-mask{{epochs=1, log_every=3}}")

    assert ["sr-ste-0"] * 12 + ["fixed-mask-1"] * 2 == [line["pass"] for line in expected]
    assert sorted(map(timeless, expected), key=str) == sorted(map(timeless, found), key=str)


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "samples_per_second"}


def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine\n")

    with pytest.raises(UsageError, match=r"notes.txt, line 1: not of a training log; choose another file"):
        logged(path, f"{METHODS['sr-ste']}, {OPTIONS}}}")
    assert "mine\n" == path.read_text()


def test_a_folder_gets_events_where_tensorboard_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, int]] = []

    @dataclasses.dataclass
    class Board:
        folder: str
        purge_step: int

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append((self.folder, self.purge_step, -1))

    monkeypatch.setattr("sparsec.training.logs.writer", lambda: Board)
    (tmp_path / "board").mkdir()
    lines, _ = logged(tmp_path / "board", f"{METHODS['sr-ste']}, {OPTIONS}}}", eval=HELD)

    assert (str(tmp_path / "board" / "sr-ste-0"), 1, -1) == told[-1]
    assert ("sr-ste-0/loss", lines[1]["loss"], 10) in told
    assert ("sr-ste-0/accuracy", lines[0]["evaluation"]["accuracy"], 6) in told


def test_a_folder_without_tensorboard_gets_the_lines_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sparsec.training.logs.writer", lambda: None)
    logged(tmp_path, f"{METHODS['sr-ste']}, {OPTIONS}}}")

    assert ["training.jsonl"] == [path.name for path in tmp_path.iterdir()]
    assert "tensorboard is not installed" in caplog.text


# Precision ------------------------------------------------------------------------------------------------------------


def test_bf16_rounds_products_and_leaves_weights_in_float32() -> None:
    found, data = trained("admm", ", precision=bf16")
    plain, other = trained("admm")

    for name, value in found.module.named_parameters():
        assert value.dtype == torch.float32
        assert not torch.equal(value, plain.module.get_parameter(name))
    losses, exact = ([loss for _, loss in each["curves"]["loss"]] for each in (data, other))
    assert losses != exact
    assert losses == pytest.approx(exact, rel=0.05)
    assert data["zeros"] == other["zeros"]
