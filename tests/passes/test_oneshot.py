"""The oneshot pass prunes on calibration data and leaves zeros in the weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, Encoder, Residual, Tied, made, random
from torch import Tensor, nn

from sparsec import Pass, PassManager, Program, trace
from sparsec.data import Calibration
from sparsec.errors import PatternError, RecipeError, SparsecError, UsageError
from sparsec.oneshot.solving import Method, misfit
from sparsec.passes.mask import Mask
from sparsec.passes.oneshot import Oneshot
from sparsec.pattern import Pattern
from sparsec.pipeline import Context, Note

PATTERNS = ["2:4", "2:5", "3:2:5", "64:2:8", "4:2:5@strip", "4:2:5+2:4", "unstructured:0.7"]
SOLVERS: list[Any] = ["none", "refit", "sparsegpt", "alps"]


def calibration(*batches: dict[str, Tensor]) -> Calibration:
    return Calibration(batches, "made here", "0" * 64, sum(len(next(iter(batch.values()))) for batch in batches))


DATA = calibration(*({"x": random(20, 5, seed=seed)} for seed in range(3)))
CONTEXT = Context(resources={"calibration": lambda: DATA})


def run(program: Program, *passes: Pass, ctx: Context = CONTEXT) -> Program:
    return PassManager(passes).run(program, ctx)


def traced(targets: dict[str, str] | None = None, net: nn.Module | None = None) -> Program:
    program = trace(net or made(Residual), (random(2, 5),))
    return program.replace(sites=program.sites.with_targets(targets)) if targets else program


def error(before: Program, after: Program) -> float:
    x = random(200, 5, seed=9)
    with torch.no_grad():
        expected, found = before(x)["output"], after(x)["output"]
    return float((found - expected).norm() / expected.norm())


def test_what_the_pass_does_by_default_is_what_its_method_does() -> None:
    given, method = Oneshot(score="wanda"), dataclasses.asdict(Method(score="wanda"))

    assert 0.1 == given.damping
    assert method == {name: getattr(given, name) for name in method}


@pytest.mark.parametrize(("solver", "score"), [("refit", "obs"), ("none", "wanda")])
def test_the_default_score_is_the_one_that_suits_the_solver(solver: Any, score: Any) -> None:
    program = traced({"*": "2:4"})
    own, named = run(program, Oneshot(solver=solver)), run(program, Oneshot(solver=solver, score=score))
    other = run(program, Oneshot(solver=solver, score="magnitude"))

    assert own.dump(hashes=True) == named.dump(hashes=True) != other.dump(hashes=True)


# Fires ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solver", "pattern"),
    [(solver, pattern) for solver in SOLVERS for pattern in PATTERNS if not misfit(Pattern.parse(pattern), solver)],
)
def test_zeros_stand_in_the_weights_where_the_selection_says(pattern: str, solver: Any) -> None:
    program = run(traced(), Oneshot(pattern, solver))

    assert {"traced", "selected", "frozen"} == program.facts
    for site in program.sites:
        weight = site.read(program.module)
        assert site.selection is not None and site.pattern == Pattern.parse(pattern) and site.mask is None
        assert 0 == site.pattern.violations_of(weight, site.selection).count
        assert not weight[~site.pattern.mask(site.selection, site.shape[2])].any()
        assert site.retained is not None and 0 < site.retained <= 1


def test_outputs_stay_closer_than_with_magnitude() -> None:
    program = traced()
    masked = error(program, run(program, Mask("2:5")))
    errors = {solver: error(program, run(program, Oneshot("2:5", solver))) for solver in ("refit", "sparsegpt", "alps")}

    assert max(errors.values()) < masked
    assert errors["alps"] < 0.8 * masked


def test_the_report_says_how_many_were_pruned_and_how_well() -> None:
    program, (report,) = PassManager((Oneshot("2:4"),)).run_reported(traced(), CONTEXT)

    assert (2, ()) == (report.data["pruned"], report.notes)
    assert ["up.weight", "down.weight"] == list(report.data["error"])
    assert all(0 < value < 1 for value in report.data["error"].values())
    assert {"pass": "oneshot{pattern=2:4}"} == program.history[-1]


def test_targets_go_before_the_option() -> None:
    program = run(traced({"up.weight": "1:4"}), Oneshot("2:4"))

    assert ["1:4", "None"] == [str(site.pattern) for site in program.sites]
    assert program.sites["down.weight"].selection is None
    assert torch.equal(made(Residual).down.weight, dict(program.module.named_parameters())["down.weight"])


def test_a_tied_weight_is_pruned_once() -> None:
    program = trace(made(Tied), (random(2, 6),))
    ctx = Context(resources={"calibration": calibration({"x": random(30, 6)})})
    after = run(program, Oneshot("2:4"), ctx=ctx)

    assert ["first.weight"] == [site.name for site in after.sites if site.selection]
    assert 2 == len(after.sites["first.weight"].users)


def test_masks_can_be_put_back_for_training_and_change_nothing() -> None:
    program = run(traced(), Oneshot("4:2:5"))
    masked = run(program, Mask())
    x = random(7, 5)

    assert {"traced", "selected", "masked"} == masked.facts
    assert torch.equal(program(x)["output"], masked(x)["output"])
    for site in masked.sites:
        kept = program.sites[site.name].selection
        assert kept is not None and site.selection is not None and site.mask is not None
        assert torch.equal(kept.positions, site.selection.positions)
    frozen = PassManager.parse("freeze").run(masked)
    assert torch.equal(program(x)["output"], frozen(x)["output"])


def test_a_frozen_result_can_be_lowered_and_saved(tmp_path: Path) -> None:
    program = run(traced(), Oneshot("4:2:5"))
    loaded = Program.load(program.save(tmp_path / "program"))
    lowered = PassManager.parse("lower").run(program)

    assert torch.equal(program(random(3, 5))["output"], loaded(random(3, 5))["output"])
    torch.testing.assert_close(program(random(3, 5))["output"], lowered(random(3, 5))["output"])


def test_work_that_was_interrupted_goes_on_in_the_workdir(tmp_path: Path) -> None:
    def stop(task: str, done: int, total: int) -> None:
        if task == "pruning" and done == 1:
            raise UsageError("stopped")

    ctx = dataclasses.replace(CONTEXT, workdir=tmp_path)
    with pytest.raises(UsageError, match="stopped"):
        run(traced(), Oneshot("2:4"), ctx=dataclasses.replace(ctx, progress=stop))
    assert ["up.weight.safetensors"] == [path.name for path in (tmp_path / "oneshot").iterdir()]
    resumed, whole = run(traced(), Oneshot("2:4"), ctx=ctx), run(traced(), Oneshot("2:4"))

    assert whole.dump(hashes=True) == resumed.dump(hashes=True)


# Does not fire --------------------------------------------------------------------------------------------------------


def test_an_excluded_site_is_reported_with_its_reason() -> None:
    program, (report,) = PassManager((Oneshot("2:4"),)).run_reported(traced(net=made(Classifier)), CONTEXT)

    assert ["head.weight"] == [note.site for note in report.notes]
    assert program.sites["head.weight"].selection is None


def test_a_site_without_pattern_is_reported_truthfully() -> None:
    _, (report,) = PassManager((Oneshot(),)).run_reported(traced({"up.weight": "2:4"}), CONTEXT)

    assert (Note("down.weight", "no pattern"),) == report.notes


def test_without_any_pattern_the_pass_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no site has a pattern; set targets, or write oneshot\{pattern=64:2:5\}"):
        run(traced(), Oneshot())


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_data_the_pass_says_how_to_give_some(solver: Any) -> None:
    with pytest.raises(UsageError, match="pass oneshot needs calibration data: give --calib DATA"):
        run(traced(), Oneshot("2:4", solver), ctx=Context())


def test_magnitude_alone_needs_no_data() -> None:
    program = run(traced(), Oneshot("2:4", "none", "magnitude"), ctx=Context())
    masked = PassManager.parse("mask{pattern=2:4} | freeze").run(traced())

    assert torch.equal(masked(random(3, 5))["output"], program(random(3, 5))["output"])


def test_freeze_after_it_is_an_error_of_order() -> None:
    with pytest.raises(RecipeError, match=r"pass freeze \(after oneshot.*\) requires a program that is masked"):
        run(traced(), Oneshot("2:4"), *PassManager.parse("freeze").passes)


def test_a_masked_program_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"up\.weight is masked already; put oneshot before mask, or freeze before"):
        run(traced(), Mask("2:4"), Oneshot())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"damping": 0.0}, "damping is 0; expected a number above 0"), ({"unreached": "maybe"}, "expected fail or dense")],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Oneshot("2:4", **options)


def test_sparsegpt_refuses_patterns_without_groups_before_any_work() -> None:
    seen: list[str] = []
    ctx = dataclasses.replace(CONTEXT, progress=lambda task, done, total: seen.append(task))
    program = traced({"up.weight": "2:4", "down.weight": "unstructured:0.5"})

    with pytest.raises(PatternError, match=r"down\.weight: unstructured:0\.5: solver sparsegpt needs groups"):
        run(program, Oneshot(solver="sparsegpt"), ctx=ctx)
    assert "pruning" not in seen


def test_activations_that_are_not_finite_name_the_site() -> None:
    ctx = Context(resources={"calibration": calibration({"x": random(4, 5) * float("nan")})})

    with pytest.raises(SparsecError, match=r"pass oneshot: up\.weight: its inputs hold NaN or Inf"):
        run(traced(), Oneshot("2:4"), ctx=ctx)


class Lost(nn.Module):
    """A layer on no token at all, beside one that sees some."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.lost = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x).sum() + self.lost(x[:, :0].reshape(-1, 5)).sum() + x


def test_a_site_that_no_sample_reaches_is_an_error_that_names_it() -> None:
    with pytest.raises(UsageError, match=r"1 sites see no token of the calibration data, the first is lost\.weight"):
        run(traced({"re:weight": "2:4"}, made(Lost)), Oneshot())


def test_a_site_that_no_sample_reaches_stays_dense_where_that_is_allowed() -> None:
    program, (report,) = PassManager((Oneshot(unreached="dense"),)).run_reported(
        traced({"re:weight": "2:4"}, made(Lost)), CONTEXT
    )

    assert (Note("lost.weight", "no calibration sample reaches it"),) == report.notes
    assert (None, "no calibration sample reaches it") == (
        program.sites["lost.weight"].pattern,
        program.sites["lost.weight"].excluded,
    )
    assert program.sites["seen.weight"].selection is not None


# Again, and equivalence -----------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_asks_for_no_data() -> None:
    once = run(traced(), Oneshot("2:4"))
    twice, (report,) = PassManager((Oneshot("2:4"),)).run_reported(once, Context())

    assert once.dump(hashes=True) == twice.dump(hashes=True)
    assert {(site.name, "selected already") for site in once.sites} == {(note.site, note.text) for note in report.notes}


def test_the_given_program_stays_as_it_is() -> None:
    program = traced()
    before = program.dump(hashes=True)
    after = run(program, Oneshot("2:4"))

    assert before == program.dump(hashes=True)
    assert "lossy" == Oneshot.equivalence
    assert error(program, after) > 0


def test_an_encoder_of_any_length_is_pruned() -> None:
    ids = [{"tokens": torch.arange(2 * n).view(2, n) % 10} for n in (3, 7, 16)]
    program = trace(made(Encoder), ids[0], {"tokens": {0: "batch", 1: "length"}}, {"length": 16})
    after = run(program, Oneshot("2:4"), ctx=Context(resources={"calibration": calibration(*ids)}))

    assert 6 == sum(site.selection is not None for site in after.sites)
