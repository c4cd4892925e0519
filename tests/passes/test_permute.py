"""The permute pass: patterns keep more of the score, and the program computes what it did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from core.axes_models import Apply, Net, TiedEmbedding
from core.axes_models import Feed as Block
from fake_backend import Formula
from models import Encoder, Residual, made, random
from torch import nn

from sparsec import PassManager, Program, trace
from sparsec.axes import rules as axis_rules
from sparsec.data import Calibration
from sparsec.errors import RecipeError, UsageError, VerificationError
from sparsec.pipeline import CLOSE, Context, PassReport, relative_difference
from sparsec.recipe import Recipe
from sparsec.resolving import with_passes
from sparsec.shorthand import recipe_of

SUMS = 1e-5  # the order of float32 sums


class Wide(nn.Module):
    """Two feed-forward blocks of 12 hidden channels, one of them gated, wide enough for every pattern to gain."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(Block(hidden=12), Block(gated=True, hidden=12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def traced(make: Any = Wide) -> Program:
    return trace(made(make), {"x": random(2, 3, 5)})


def run(program: Program, text: str, **resources: Any) -> tuple[Program, PassReport]:
    passes = PassManager.parse(text)
    after, reports = passes.run_reported(program, Context(resources=resources), check="outputs")
    return after, reports[0]


def texts(report: PassReport) -> dict[str, str]:
    return {note.site: note.text for note in report.notes}


# Fires ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["2:4", "4:2:5", "4:2:5+2:4"])
def test_every_site_that_moves_keeps_more_and_outputs_stay(pattern: str) -> None:
    program = traced()

    after, report = run(program, f"permute{{pattern={pattern}}}")

    shares = report.data["retained"]
    assert sum(now for _, now in shares.values()) > sum(then for then, _ in shares.values())
    assert {"permuted", "traced"} == after.facts
    assert report.data["difference"] <= 1e-9
    for name, value in program(**program.inputs).items():
        assert relative_difference(after(**after.inputs)[name], value) <= CLOSE
    assert any(entry["gain"] > 0 for entry in report.data["variables"].values())


def test_what_it_says_is_kept_is_what_masking_then_keeps() -> None:
    after, report = run(traced(), "permute{pattern=2:4} | mask")

    for name, (_, now) in report.data["retained"].items():
        assert pytest.approx(now, rel=SUMS) == after.sites[name].retained


def test_a_bert_layer_is_permuted_inside_its_heads_and_its_feed_forward() -> None:
    program = trace(made(Encoder), {"tokens": torch.tensor([[1, 2, 3], [4, 5, 6]])})

    _, report = run(program, "permute{pattern=1:2}")

    assert {"query.weight:0", "up.weight:0"} == report.data["variables"].keys()
    kept = report.data["retained"]
    assert kept["down.weight"][1] > kept["down.weight"][0]
    assert "no pattern keeps more by it" == texts(report)["value.weight:0"]
    assert any("axes may not be permuted" in text for text in texts(report).values())


def test_the_permuted_weights_are_those_of_the_same_model() -> None:
    net, x = made(Wide), random(4, 3, 5, seed=1)
    program = trace(net, {"x": random(2, 3, 5)})
    before, expected = net.net.blocks[0].up.weight.clone(), net(x).detach()

    run(program, "permute{pattern=2:4}")[0].write_back(net)

    assert not torch.equal(before, net.net.blocks[0].up.weight)
    assert relative_difference(net(x), expected) <= CLOSE


def test_a_tied_table_stays_tied() -> None:
    net = made(TiedEmbedding)
    program = trace(net, {"tokens": torch.tensor([[1, 2], [3, 4]])})

    run(program, "permute{pattern=2:4}")[0].write_back(net)

    expected = program(tokens=torch.tensor([[5, 6], [7, 8]]))
    for name, value in trace(net, program.inputs)(tokens=torch.tensor([[5, 6], [7, 8]])).items():
        assert relative_difference(value, expected[name]) <= CLOSE


@pytest.mark.parametrize("passes", ["mask | freeze", "oneshot{solver=sparsegpt}", "oneshot"])
def test_later_passes_work_on_permuted_weights_without_knowing(passes: str) -> None:
    data = Calibration(tuple({"x": random(20, 3, 5, seed=seed)} for seed in range(3)), "made here", "0" * 64, 180)
    manager = PassManager.parse(f"permute{{pattern=4:2:5, score=wanda}} | {passes} | lower")

    after = manager.run(traced(), Context(resources={"calibration": data}))

    assert {"permuted", "lowered"} <= after.facts


@pytest.mark.parametrize("solver", ["oneshot", "mask | freeze"])
def test_kernel_mode_gives_strips_rows_that_need_not_be_neighbours(solver: str, tmp_path: Path) -> None:
    program = traced(lambda: Net(Block(hidden=48)))
    data = Calibration(tuple({"x": random(20, 3, 5, seed=seed)} for seed in range(3)), "made here", "0" * 64, 180)
    context = Context(resources={"calibration": data})

    permuted, (report,) = PassManager.parse("permute{pattern=16:2:8, mode=kernel}").run_reported(program, context)
    permuted.save(tmp_path / "permuted")
    after = PassManager.parse(solver).run(Program.load(tmp_path / "permuted"), context)

    up = after.sites["blocks.0.up.weight"]
    assert "16:2:8@strip" == str(up.pattern)
    assert permuted.sites[up.name].rows is not None
    assert torch.equal(permuted.sites[up.name].rows, up.selection.rows)  # type: ignore[union-attr, arg-type]
    assert torch.equal(permuted.sites[up.name].read(permuted.module), program.sites[up.name].read(program.module))
    assert report.data["retained"][up.name][1] > report.data["retained"][up.name][0]
    weight = up.read(after.module)
    assert 0 == up.pattern.violations_of(weight, up.selection).count  # type: ignore[union-attr, arg-type]


def test_both_folds_and_then_makes_strips_of_neighbours() -> None:
    program = traced(lambda: Net(Block(hidden=20)))

    (graph, plain), (both, report) = (
        run(program, f"permute{{pattern=16:2:8, mode={m}, rounds=1}}") for m in ("graph", "both")
    )

    up = both.sites["blocks.0.up.weight"]
    assert ("16:2:8@strip", None) == (str(up.pattern), up.rows)
    assert torch.equal(graph.sites[up.name].read(graph.module), up.read(both.module))
    assert plain.data["retained"].keys() == report.data["retained"].keys()
    for name, (then, now) in report.data["retained"].items():
        assert then == plain.data["retained"][name][0]
        assert now >= plain.data["retained"][name][1]


@pytest.mark.parametrize("mode", ["kernel", "both"])
def test_what_needs_windows_of_its_own_keeps_them(mode: str) -> None:
    """Two patterns at once, and N:M, are no strips."""
    program = traced(lambda: Net(Block(hidden=20)))
    targets = {"re:up": "16:2:5+2:4", "re:down": "2:4"}
    program = program.replace(sites=program.sites.with_targets(targets))

    after, report = run(program, f"permute{{mode={mode}, rounds=1}}")

    assert {"16:2:5+2:4", "2:4"} == {str(site.pattern) for site in after.sites.sparse}
    assert (mode == "both") == bool(report.data.get("retained"))


@pytest.mark.parametrize(
    ("asked", "mode"),
    [
        (("kernel",), "kernel"),
        (("kernel", "onnx"), "both"),
        (("kernel", "hf", "onnx"), "both"),
        (("kernel", "tensorrt"), "graph"),
        (("onnx", "torch24"), "graph"),
        ((), "graph"),
    ],
)
def test_auto_looks_at_the_backends(asked: tuple[str, ...], mode: str) -> None:
    _, report = run(trace(made(Residual), (random(2, 5),)), "permute{pattern=16:2:5, mode=auto}", backends=asked)

    assert mode == report.data["mode"]


def test_auto_with_one_backend_asks_it_for_its_name() -> None:
    _, report = run(trace(made(Residual), (random(2, 5),)), "permute{pattern=16:2:5, mode=auto}", backend=Formula())

    assert "graph" == report.data["mode"]


# Does not fire --------------------------------------------------------------------------------------------------------


def test_no_time_means_no_permutation_and_says_so() -> None:
    program = traced()

    after, report = run(program, "permute{pattern=2:4, seconds=0}")

    assert "nothing: no seconds were given" == texts(report)["all"] == report.data["words"]
    for name, value in program.module.named_parameters():
        assert torch.equal(value, dict(after.module.named_parameters())[name])


def test_a_pattern_that_order_does_not_help_is_left() -> None:
    _, report = run(traced(), "permute{pattern=unstructured:0.5}")

    assert "unstructured:0.5 keeps the same in any order" in texts(report).values()
    assert "nothing: no site gains in mode graph" == texts(report)["all"]


def test_a_second_run_finds_chosen_weights_held() -> None:
    after, _ = run(traced(), "permute{pattern=2:4} | mask | freeze")

    again, report = run(after, "permute")

    assert any("chosen already" in text for text in texts(report).values())
    assert again.dump(hashes=True) == after.dump(hashes=True)


def test_channels_that_a_chosen_pattern_holds_stay() -> None:
    """One block's `up` is chosen already; its hidden channels would serve `down`, which is not."""
    program = traced()
    chosen = program.replace(sites=program.sites.with_targets({"net.blocks.0.up.weight": "2:4"}))
    chosen = PassManager.parse("mask | freeze").run(chosen)
    chosen = chosen.replace(sites=chosen.sites.with_targets({"re:down": "2:4"}))

    after, report = run(chosen, "permute{rounds=1}")

    assert {"net.blocks.1.up.weight:0"} == report.data["variables"].keys()
    assert "it moves net.blocks.0.up.weight, whose pattern is already chosen" in texts(report).values()
    for name in ("net.blocks.0.up.weight", "net.blocks.0.down.weight"):
        assert torch.equal(chosen.sites[name].read(chosen.module), after.sites[name].read(after.module))


def test_a_recipe_without_patterns_is_refused() -> None:
    with pytest.raises(RecipeError, match="no site has a pattern"):
        run(traced(), "permute")


@pytest.mark.parametrize("options", ["rounds=0", "seconds=-1"])
def test_options_out_of_range_are_refused(options: str) -> None:
    with pytest.raises(RecipeError, match="rounds of 1 or more and seconds of 0 or more"):
        PassManager.parse(f"permute{{{options}}}")


# The command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"pattern": "64:2:5"}, "permute{mode=auto}"),  # what follows is decided when the model is loaded
        ({"pattern": "64:2:5", "solver": "none"}, "permute{mode=auto} | mask | freeze"),
        ({"target_speedup": 1.5}, "choose-vm{speedup=1.5, objective=reconstruction} | permute{mode=auto} | oneshot"),
        ({"pattern": "64:2:5", "permute": "none"}, ""),
    ],
)
def test_the_option_permutes_after_patterns_are_chosen_and_before_weights_are(
    options: dict[str, Any], passes: str
) -> None:
    given = dict.fromkeys(("layer", "ignore", "recipe", "passes", "score", "columns", "backend", "seed"))
    given |= {"model": "demo:minilm", "pattern": None, "include_pooler": False, "permute": "auto"}

    assert passes == recipe_of(**{**given, **options}).passes


@pytest.mark.parametrize(
    ("passes", "has_data", "found"),
    [
        ("permute{mode=auto}", True, "permute{mode=auto} | oneshot"),
        ("permute{mode=auto}", False, "permute{mode=auto} | mask | freeze"),
        ("", False, "mask | freeze"),
        ("permute{mode=auto} | mask | freeze", True, "permute{mode=auto} | mask | freeze"),
    ],
)
def test_the_default_passes_follow_a_permutation_too_with_calibration_data_or_without(
    passes: str, has_data: bool, found: str
) -> None:
    recipe = Recipe.from_data({"model": "mine:make", "targets": {"*": "2:4"}, "passes": passes})

    assert found == with_passes(recipe, has_data, allow_dense=False).passes


def test_the_option_beside_its_pass_is_refused() -> None:
    given = dict.fromkeys(("layer", "ignore", "recipe", "score", "columns", "backend", "seed"))
    given |= {"model": "demo:minilm", "pattern": "2:4", "include_pooler": False, "passes": "permute | mask"}

    with pytest.raises(UsageError, match="the passes have one"):
        recipe_of(**given, permute="graph")


# The proof ------------------------------------------------------------------------------------------------------------


def test_a_wrong_rule_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program = traced(lambda: Net(Apply(lambda x: torch.tanh(x).cumsum(-1)), Block()))
    program = program.replace(sites=program.sites.with_targets({"re:weight": "2:4"}))
    before = program.dump(hashes=True)
    monkeypatch.setitem(axis_rules.RULES, "cumsum", axis_rules.RULES["relu"])

    with pytest.raises(VerificationError, match=r"pass permute: .* is cumsum \(aten\.cumsum\.default\); nothing was"):
        run(program, "permute")
    assert before == program.dump(hashes=True)
