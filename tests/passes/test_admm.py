"""The admm pass pulls weights towards the pattern while they are trained, then projects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from training_models import FAST, METHODS, PATTERNS, Wide, check, context, run, task, wide

import sparsec
from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError, TrainingError, UsageError
from sparsec.passes.admm import Admm

QUICK = sparsec.Options(measure_speed=False)
# One sparse pattern by default, all in `make test-all`.
GRID = [
    pytest.param(text, pattern, marks=() if pattern == "16:2:8" or name == "admm" else pytest.mark.slow)
    for name, text in METHODS.items()
    for pattern in PATTERNS
]


# Fires, for all methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "pattern"), GRID)
def test_every_method_ends_in_every_pattern_and_as_an_artifact(text: str, pattern: str, tmp_path: Path) -> None:
    passes = f"{text}, {FAST}}}"
    done, _ = run(passes, wide({"*": pattern}))
    check(done, pattern)

    sparsec.compile(
        models.made(Wide),
        (models.random(2, 12),),
        out=tmp_path / "made",
        pattern=pattern,
        passes=passes,
        resources={"train": task()},
        options=QUICK,
    )
    x = models.random(2, 12)
    with torch.no_grad():
        expected, found = done(x)["logits"], sparsec.load(tmp_path / "made")(x=x)["logits"]
    assert torch.allclose(expected, found, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("text", METHODS.values(), ids=METHODS)
def test_every_method_learns_the_task_and_trains_the_head(text: str) -> None:
    program = wide({"*": "2:4"})
    before = {name: value.clone() for name, value in program.module.named_parameters()}
    done, report = run(f"{text.replace('epochs=2', 'epochs=8')}, lr=0.02}}", program)
    losses = [value for _, value in report.data["curves"]["loss"]]

    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert done.sites["head.weight"].selection is None
    for name, value in program.module.named_parameters():
        assert torch.equal(before[name], value)
        assert not torch.equal(value, done.module.get_parameter(name))
    assert list(before) == [name for name, _ in done.module.named_parameters()]


# Fires ----------------------------------------------------------------------------------------------------------------


def test_the_report_has_residuals_and_what_was_trained_on() -> None:
    _, report = run("admm{pattern=2:4, epochs=4, rho=0.01}")

    assert (2, 0, 24) == tuple(report.data[key] for key in ("trained", "violations", "steps"))
    assert [6, 12, 18, 24] == [step for step, _ in report.data["curves"]["primal"]]
    assert {"loss", "primal", "dual", "rho"} == report.data["curves"].keys()
    assert 96 == report.data["data"]["samples"]
    assert ["head.weight"] == [note.site for note in report.notes]


def test_frozen_epochs_train_the_kept_weights_only() -> None:
    """The choice is made before them, so training on does not move the zeros."""
    short, _ = run("admm{pattern=2:4, epochs=2, every=2, frozen_epochs=1, lr=0.01}")
    check(short, "2:4")
    _, report = run("admm{pattern=2:4, epochs=2, every=2, frozen_epochs=1}")

    assert [2, 4, 6] == [step for step, _ in report.data["curves"]["primal"]]
    _, report = run("admm{pattern=2:4, epochs=3, frozen_epochs=1}")
    assert [6, 12] == [step for step, _ in report.data["curves"]["primal"]]


def test_distillation_from_the_dense_program_brings_outputs_closer() -> None:
    program, x = wide({"*": "1:4"}), models.random(200, 12, seed=3)
    unlabelled = [{"x": models.random(32, 12, seed=seed)} for seed in range(8)]
    options = "epochs=20, rho=0.01, every=4, lr=0.01, frozen_epochs=8"
    done, _ = run(f"admm{{{options}, distill=1, batch_size=32}}", program, context(unlabelled))
    masked = PassManager.parse("mask | freeze").run(program)
    with torch.no_grad():
        dense, found, pruned = (one(x)["logits"].log_softmax(1) for one in (program, done, masked))

    assert float((found - dense).norm()) < 0.8 * float((pruned - dense).norm())


def test_a_named_teacher_takes_the_place_of_the_dense_program() -> None:
    teacher = wide().clone()
    text = "admm{pattern=2:4, epochs=2, distill=1, loss=none, teacher=big, lr=0.01}"
    named, _ = run(text, wide(), context(big=teacher))
    default, _ = run(text.replace(", teacher=big", ""), wide())

    assert named.dump(hashes=True) == default.dump(hashes=True)
    with pytest.raises(UsageError, match="teacher 'big' is not there; expected a Program"):
        run(text)


# Does not fire --------------------------------------------------------------------------------------------------------


def test_a_site_that_is_selected_keeps_its_selection() -> None:
    masked = PassManager.parse("mask").run(wide({"up.weight": "2:4"}))
    program = masked.replace(sites=masked.sites.with_targets({"down.weight": "1:4"}))
    done, _ = run(f"{METHODS['admm']}, lr=0.01}}", program)

    for name in ("up.weight", "down.weight"):
        assert done.sites[name].selection is not None
    kept, before = done.sites["up.weight"].selection, masked.sites["up.weight"].selection
    assert kept is not None and before is not None
    assert torch.equal(before.positions, kept.positions)
    assert 0 == sparsec.Pattern.parse("1:4").violations(done.sites["down.weight"].read(done.module)).count


# Again ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_and_says_what_would_train_on() -> None:
    done, _ = run("admm{pattern=2:4, epochs=1}")

    with pytest.raises(RecipeError, match="every site is selected already, so admm has no weights to choose"):
        run("admm{epochs=1}", done)
    again, _ = run("fixed-mask{epochs=1, lr=0.01}", done)
    check(again, "2:4")


def test_the_same_seed_gives_the_same_program() -> None:
    one, other = (run("admm{pattern=2:4, epochs=1, lr=0.01}")[0] for _ in range(2))

    assert one.dump(hashes=True) == other.dump(hashes=True)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("rho=0", "pass admm: rho is 0; expected a number above 0"),
        ("rho=-1", "pass admm: rho is -1; expected a number above 0"),
        ("rho=nan", "pass admm: rho is nan"),
        ("frozen_epochs=10", "at least one epoch that is not frozen"),
        ("every=-1", "every is -1"),
        ("epochs=0", "epochs"),
        ("lr=0", "pass admm: lr is 0"),
        ("batch_size=0", "batch_size is 0"),
        ("distill=-1", "distill is -1"),
        ("temperature=0", "temperature is 0"),
        ("balance=wild", "balance"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_any_work(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PassManager.parse(f"admm{{pattern=2:4, {options}}}")


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], UsageError, "needs training data 'train'|there are no batches"),
        ([1], UsageError, "batch 0 is a int; expected a dict of tensors"),
        ([{"y": torch.zeros(2, 12)}], UsageError, r"train: batch 0 has y; the model takes x"),
        ([{"x": torch.zeros(2, 11)}], UsageError, r"train: batch 0: x is float32\[2, 11\]"),
        ([{"x": torch.zeros(2, 12)}], UsageError, "there is nothing to learn from"),
        (
            [{"x": torch.zeros(2, 12), "labels": torch.zeros(3, dtype=torch.int64)}],
            UsageError,
            r"different numbers of samples: x \[2, 12\], labels \[3\]",
        ),
        (
            [{"x": torch.zeros(2, 12), "labels": torch.tensor([0, 3])}],
            UsageError,
            "found the label 3; the model has 3 classes",
        ),
        (
            [{"x": torch.full((2, 12), float("nan")), "labels": torch.tensor([0, 1])}],
            TrainingError,
            "the loss is nan at step 1 of 10",
        ),
    ],
)
def test_data_that_does_not_fit_is_named(batches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PassManager((Admm("2:4"),)).run(wide(), sparsec.Context(resources={"train": batches}))


def test_without_data_the_pass_says_how_to_give_some() -> None:
    with pytest.raises(UsageError, match=r"pass admm needs training data 'train': .*Context\(resources="):
        PassManager((Admm("2:4"),)).run(wide())


def test_without_any_pattern_the_pass_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pass admm: no site has a pattern; .*admm\{pattern=64:2:5\}"):
        run("admm")


def test_a_schedule_too_long_for_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match="masks would never be chosen anew: 6 steps"):
        run("admm{pattern=2:4, epochs=1, every=100}")


def test_a_pruned_program_is_no_dense_teacher() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="the program is pruned already, so it is no dense teacher"):
        run("fixed-mask{epochs=1, distill=1}", masked)


def test_gradual_is_not_defined_for_intersections_and_the_others_are() -> None:
    with pytest.raises(PatternError, match=r"up\.weight: gradual pruning is defined for .* found 4:2:5\+2:4"):
        run(f"{METHODS['gradual']}, pattern=4:2:5+2:4}}")
    done, _ = run(f"{METHODS['admm']}, pattern=4:2:5+2:4}}")
    for site in done.sites.sparse:
        assert site.pattern is not None and site.selection is not None
        assert 0 == site.pattern.violations_of(site.read(done.module), site.selection).count


# Equivalence ----------------------------------------------------------------------------------------------------------


def test_training_is_declared_lossy() -> None:
    assert "lossy" == Admm.equivalence
