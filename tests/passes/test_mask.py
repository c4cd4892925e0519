"""The mask pass chooses weights and says so in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import Classifier, Encoder, Residual, Tied, made, random

from sparsec import Pass, PassManager, Program, _fx, trace
from sparsec.data import Calibration
from sparsec.errors import PatternError, RecipeError, UsageError
from sparsec.passes.mask import Mask
from sparsec.pattern import Pattern
from sparsec.pipeline import Context, Note

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
ONE_ROUNDING = 1e-6  # the retained share is computed in fp64 here, in fp32 sums of 40 scores there
PATTERNS = ["2:4", "1:4", "2:8", "4:8", "2:5", "3:2:5", "64:2:8", "4:2:5@strip", "unstructured:0.7"]


DATA = Calibration(tuple({"x": random(20, 5, seed=seed)} for seed in range(3)), "made here", "0" * 64, 60)


def run(program: Program, *passes: Pass) -> Program:
    return PassManager(passes).run(program, Context(resources={"calibration": DATA}))


def traced(targets: dict[str, str] | None = None) -> Program:
    program = trace(made(Residual), (random(2, 5),))
    return program.replace(sites=program.sites.with_targets(targets)) if targets else program


# Fires ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_outputs_are_those_of_the_masked_weights(pattern: str) -> None:
    program = run(traced(), Mask(pattern))
    net, x = made(Residual), random(4, 5, seed=1)
    with torch.no_grad():
        for name, weight in (("up.weight", net.up.weight), ("down.weight", net.down.weight)):
            mask = _fx.get_tensor(program.module, f"{name}_mask")
            assert torch.bool == mask.dtype
            assert weight.shape == mask.shape
            weight.copy_(torch.where(mask, weight, 0.0))
            assert 0 == Pattern.parse(pattern).violations(weight[None]).count

        assert torch.equal(net(x), program(x)["output"])


def test_the_largest_weights_are_kept_and_their_share_is_recorded() -> None:
    program = run(traced(), Mask("2:4"))
    site, weight = program.sites["up.weight"], made(Residual).up.weight.detach().abs().double()
    groups = [weight[:, :4].topk(2).values.sum(), weight[:, 4:].sum()]

    assert pytest.approx(float(sum(groups) / weight.sum()), rel=ONE_ROUNDING) == site.retained
    assert ("up.weight_mask", Pattern.parse("2:4")) == (site.mask, site.pattern)
    assert site.selection is not None


@pytest.mark.parametrize("columns", ["l1", "l2", "greedy", "exact"])
def test_every_way_to_choose_columns_is_legal(columns: str) -> None:
    program = run(traced(), Mask("4:2:5", columns=columns))  # type: ignore[arg-type]
    mask = _fx.get_tensor(program.module, "up.weight_mask")

    assert 0 == Pattern.parse("4:2:5").violations(mask[None].float()).count


def test_targets_go_before_the_option() -> None:
    program = run(traced({"up.weight": "1:4"}), Mask())

    assert ["1:4", "None"] == [str(site.pattern) for site in program.sites]
    assert [True, False] == [_fx.has_tensor(program.module, f"{site.name}_mask") for site in program.sites]


def test_tied_weights_are_masked_once_for_all_users() -> None:
    program = run(trace(made(Tied), (random(2, 6),)), Mask("2:4"))
    net, x = made(Tied), random(3, 6, seed=1)
    with torch.no_grad():
        net.first.weight.copy_(torch.where(_fx.get_tensor(program.module, "first.weight_mask"), net.first.weight, 0.0))

    assert ["first.weight_mask"] == [name for name, _ in program.module.named_buffers()]
    assert 1 == len(list(_fx.calls(program.module.graph, torch.ops.aten.where.ScalarOther)))
    assert torch.equal(net(x), program(x)["output"])


def test_a_mask_stands_in_the_scope_of_its_layer() -> None:
    program = run(traced(), Mask("2:4"))

    masked = _fx.calls(program.module.graph, torch.ops.aten.where.ScalarOther)
    assert ["up", "down"] == [node.meta[_fx.SCOPE] for node in masked]


def test_the_pass_reports_how_many_it_masked() -> None:
    _, (report,) = PassManager((Mask("2:4"),)).run_reported(traced())

    assert ({"masked": 2}, ()) == (report.data, report.notes)


def test_gradients_reach_only_the_weights_that_are_kept() -> None:
    program = run(traced(), Mask("1:4"))
    program(random(2, 5))["output"].sum().backward()
    weight = dict(program.module.named_parameters())["up.weight"]

    assert weight.grad is not None
    assert not weight.grad[~_fx.get_tensor(program.module, "up.weight_mask")].any()
    assert weight.grad.any()


def test_the_program_reads_as_stored() -> None:
    net = made(Classifier)
    program = run(trace(net, (random(2, 5),)), Mask("64:2:5"))

    assert (GOLDEN / "tiny.txt").read_text() == program.dump()


# Scores from data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("score", ["wanda", "ria", "obs", "taylor", "fisher", "seven"])
def test_every_score_gives_legal_masks_and_leaves_weights_as_they_are(score: Any, pattern: str) -> None:
    program = run(traced(), Mask(pattern, score))
    for name, weight in made(Residual).named_parameters():
        assert torch.equal(weight, _fx.get_tensor(program.module, name))
    for site in program.sites:
        assert site.pattern is not None and site.selection is not None and site.mask is not None
        mask = _fx.get_tensor(program.module, site.mask)
        assert torch.equal(site.pattern.mask(site.selection, site.shape[2])[0], mask)
        assert 0 == site.pattern.violations_of(mask[None].float(), site.selection).count


def test_wanda_keeps_the_largest_products_on_the_inputs_that_masked_layers_give() -> None:
    program, net = run(traced(), Mask("2:4", "wanda")), made(Residual)
    x = torch.cat([batch["x"] for batch in DATA.batches])
    with torch.no_grad():
        for name, layer in (("up.weight", net.up), ("down.weight", net.down)):
            score = layer.weight.abs() * x.square().mean(0).sqrt()
            mask = Pattern.parse("2:4").mask(Pattern.parse("2:4").project(score), layer.in_features)[0]
            assert torch.equal(mask, _fx.get_tensor(program.module, f"{name}_mask"))
            retained = program.sites[name].retained
            assert pytest.approx(float(score[mask].sum() / score.sum()), rel=1e-5) == retained
            x = torch.nn.functional.gelu(torch.nn.functional.linear(x, layer.weight.where(mask, 0.0), layer.bias))


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
@pytest.mark.parametrize("normalise", ["none", "row", "rank"])
def test_normalised_scores_choose_legal_columns(score: Any, normalise: Any) -> None:
    program = run(traced(), Mask("4:2:5", score, normalise=normalise))

    for site in program.sites:
        mask = _fx.get_tensor(program.module, str(site.mask))
        assert 0 == Pattern.parse("4:2:5").violations(mask[None].float()).count


def test_a_score_that_looks_at_inputs_needs_data_and_magnitude_does_not() -> None:
    PassManager((Mask("2:4"),)).run(traced())

    with pytest.raises(UsageError, match="pass mask needs calibration data"):
        PassManager((Mask("2:4", "wanda"),)).run(traced())


# Does not fire --------------------------------------------------------------------------------------------------------


def test_an_excluded_site_is_reported_with_its_reason() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    program, (report,) = PassManager((Mask("2:4"),)).run_reported(trace(made(Encoder), (tokens,)))

    assert ["pooler.weight"] == [note.site for note in report.notes]
    assert "the pooler (role pooler)" in report.notes[0].text
    assert program.sites["pooler.weight"].mask is None


def test_a_site_without_pattern_is_reported_truthfully() -> None:
    _, (report,) = PassManager((Mask(),)).run_reported(traced({"up.weight": "2:4"}))

    assert (Note("down.weight", "no pattern"),) == report.notes


def test_without_any_pattern_the_pass_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no site has a pattern; set targets, or write mask\{pattern="):
        run(traced(), Mask())


def test_a_bad_pattern_is_refused_in_its_own_words() -> None:
    with pytest.raises(PatternError, match="banana"):
        run(traced(), Mask("banana"))


def test_a_model_without_linear_weights_is_refused() -> None:
    class Sine(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    with pytest.raises(UsageError, match="no linear weight"):
        run(trace(Sine(), (random(2, 5),)), Mask("2:4"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    net = made(Residual)
    with torch.no_grad():
        net.down.weight[0, 0] = value

    with pytest.raises(PatternError, match=r"down\.weight: the weight holds NaN or Inf"):
        run(trace(net, (random(2, 5),)), Mask("2:4"))


def test_a_weight_of_zeros_retains_all_and_keeps_exactly_n() -> None:
    net = made(Residual)
    with torch.no_grad():
        net.up.weight.zero_()
    program = run(trace(net, (random(2, 5),)), Mask("2:4"))

    assert 1.0 == program.sites["up.weight"].retained
    assert [3] * 8 == _fx.get_tensor(program.module, "up.weight_mask").sum(1).tolist()


# Again ----------------------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing() -> None:
    once = run(traced(), Mask("2:4"))
    twice, (report,) = PassManager((Mask("2:4"),)).run_reported(once)

    assert once.dump() == twice.dump()
    assert {(site.name, "masked already") for site in once.sites} == {(note.site, note.text) for note in report.notes}
    assert all(
        torch.equal(buffer, dict(once.module.named_buffers())[name]) for name, buffer in twice.module.named_buffers()
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_masking_a_frozen_program_again_keeps_its_outputs(pattern: str) -> None:
    frozen = PassManager.parse(f"mask{{pattern={pattern}}} | freeze").run(traced())
    again = PassManager.parse("mask | freeze").run(frozen)

    assert torch.equal(frozen(random(3, 5))["output"], again(random(3, 5))["output"])


# Equivalence ----------------------------------------------------------------------------------------------------------


def test_masking_is_declared_lossy_and_changes_outputs() -> None:
    program, x = traced(), random(3, 5)

    assert "lossy" == Mask.equivalence
    assert not torch.equal(program(x)["output"], run(program, Mask("1:4"))(x)["output"])


def test_a_pattern_that_keeps_everything_a_small_weight_has_changes_nothing() -> None:
    program, x = traced(), random(3, 5)

    assert torch.equal(program(x)["output"], run(program, Mask("8:16"))(x)["output"])
