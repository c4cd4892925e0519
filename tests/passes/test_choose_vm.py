"""The choose-vm pass gives sites patterns under a budget, and changes nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_backend import Formula
from models import made, random
from torch import Tensor, nn

from sparsec import Options, PassManager, Program, Recipe, compile, trace
from sparsec.data import Calibration
from sparsec.errors import RecipeError, SparsecError, UsageError
from sparsec.passes.choose_vm import ChooseVM
from sparsec.pipeline import Context, PassReport

CANDIDATES = "2:4,1:4,16:2:8"


class Stack(nn.Module):
    """Layers that take some of the time; in the second, two weights in eight matter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128, bias=False) for _ in range(4))
        with torch.no_grad():
            self.layers[1].weight[:, torch.arange(128) % 8 > 1] *= 1e-4

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return x


def traced(targets: dict[str, str] | None = None) -> Program:
    program = trace(made(Stack), {"x": random(64, 128)}, {"x": {0: "batch"}})
    return program.replace(sites=program.sites.with_targets(targets)) if targets else program


def run(program: Program, text: str, ctx: Context | None = None) -> tuple[Program, PassReport]:
    ctx = ctx or Context(cost=Formula().cost)
    done, (report,) = PassManager.parse(f'choose-vm{{candidates="{CANDIDATES}", {text}}}').run_reported(
        program, ctx, "outputs"
    )
    return done, report


def patterns(program: Program) -> dict[str, str]:
    return {site.name: str(site.pattern or site.excluded) for site in program.sites}


# Fires ----------------------------------------------------------------------------------------------------------------


def test_every_site_has_a_pattern_or_a_reason_and_the_report_says_the_targets() -> None:
    done, report = run(traced(), "speedup=1.1, tokens=64")

    assert report.data["speed"] >= 1.1
    assert all(site.pattern or site.excluded for site in done.sites)
    again = traced(report.data["targets"])
    assert [site.pattern for site in done.sites] == [site.pattern for site in again.sites]


@pytest.mark.parametrize("objective", ["retained", "reconstruction", "sensitivity"])
def test_a_density_is_met_by_every_objective_without_any_cost(objective: str) -> None:
    batches = tuple({"x": random(64, 128, seed=i)} for i in range(2))
    data = Calibration(batches, "random", "", 128)
    done, report = run(
        traced(), f"budget=density, density=0.4, objective={objective}", Context(resources={"calibration": data})
    )
    kept = sum(site.pattern.density if site.pattern else 1.0 for site in done.sites) / 4

    assert kept == pytest.approx(report.data["density"])
    assert 0.3 < kept <= 0.4
    assert "speed" not in report.data


def test_the_site_that_loses_nothing_is_made_the_sparsest() -> None:
    done, _ = run(traced(), "density=0.5")

    assert done.sites["layers.1.weight"].pattern.density == min(s.pattern.density for s in done.sites.sparse)  # type: ignore[union-attr]


def test_a_pattern_that_was_set_stays_and_counts_in_the_budget() -> None:
    done, report = run(traced({"layers.0.weight": "1:4", "layers.3.weight": "ignore"}), "density=0.625")

    assert "1:4" == patterns(done)["layers.0.weight"]
    assert "ignored by 'layers.3.weight'" == patterns(done)["layers.3.weight"]
    assert report.data["density"] == pytest.approx((0.25 + 1 + 2 * 0.5) / 4, abs=0.07)
    assert report.data["density"] <= 0.625
    assert {"layers.0.weight": "has 1:4 already", "layers.3.weight": "ignored by 'layers.3.weight'"} == {
        note.site: note.text for note in report.notes[:2]
    }


def test_one_pattern_for_all_can_be_asked_for() -> None:
    done, _ = run(traced(), "density=0.5, uniform=true")

    assert {"2:4"} == set(patterns(done).values())


def test_sites_that_stay_dense_say_so() -> None:
    done, report = run(traced(), "density=0.9")
    dense = [site for site in done.sites if site.pattern is None]

    assert dense
    assert {"dense by choose-vm: other sites lose less for the same density"} == {site.excluded for site in dense}
    assert {site.name for site in dense} == {note.site for note in report.notes}


def test_mode_paper_gives_all_sites_one_v_and_m_and_says_what_it_weighed() -> None:
    done, report = run(traced(), "density=0.26, mode=paper")

    assert {"16:2:8"} == set(patterns(done).values())
    assert ["16:2:8", "32:2:8", "64:2:8", "128:2:8"] == list(report.data["considered"])
    assert 0.2323 == pytest.approx(report.data["considered"]["64:2:8"], abs=5e-5)


# Does not fire, and says why ------------------------------------------------------------------------------------------


def test_nothing_is_chosen_where_every_pattern_was_set() -> None:
    program = traced({"*": "2:4"})
    done, report = run(program, "density=0.1", Context())

    assert {"chosen": 0} == report.data
    assert {"has 2:4 already"} == {note.text for note in report.notes}
    assert patterns(program) == patterns(done)


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        ("{uniform=true}", RecipeError, "expected one of speedup, latency and density, .*found none"),
        ("{speedup=2, density=0.5}", RecipeError, "found speedup=2, density=0.5"),
        ("{budget=latency, density=0.5}", RecipeError, "found density=0.5 with budget=latency"),
        ("{speedup=1}", UsageError, "speedup 1: expected a number above 1"),
        ("{density=1.5}", UsageError, "expected a number between 0 and 1"),
        ("{density=-0.5}", UsageError, "expected a number between 0 and 1"),
        ("{latency=-1}", UsageError, "expected a number above 0"),
        ('{density=0.5, candidates="2:4,nonsense"}', UsageError, "'nonsense' cannot be read"),
        ('{density=0.5, candidates="2:4,dense"}', UsageError, "every site may stay dense anyway"),
        ("{density=0.5, objective=luck}", RecipeError, "objective"),
        ("{density=0.5, mode=luck}", RecipeError, "mode"),
        ("{density=0.5, values=fp64}", UsageError, "values 'fp64': expected fp32 or bf16 or int8"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_when_read(text: str, kind: type[SparsecError], part: str) -> None:
    with pytest.raises(kind, match=part):
        PassManager.parse(f"choose-vm{text}")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("speedup=1.5", "no cost is known here; compile gives one"),
        ("density=0.5, objective=reconstruction", "pass choose-vm needs calibration data"),
    ],
)
def test_what_is_missing_is_named(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        run(traced(), text, Context())


def test_a_pass_without_a_budget_is_refused_when_it_runs() -> None:
    with pytest.raises(RecipeError, match="expected one of speedup, latency and density"):
        PassManager.parse("choose-vm").run(traced())


def test_a_density_out_of_reach_says_the_least_there_is() -> None:
    with pytest.raises(SparsecError, match=r"density 0.1 cannot be reached: the least is 0\.250") as error:
        run(traced(), "density=0.1")
    assert 1 == error.value.exit_code


# A second run changes nothing -----------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing() -> None:
    once, _ = run(traced(), "density=0.5")
    twice, report = run(once, "density=0.3")

    assert {"chosen": 0} == report.data
    assert patterns(once) == patterns(twice)


def test_an_interrupted_run_goes_on_with_the_choice_it_had_made(tmp_path: Path) -> None:
    ctx = Context(cost=Formula().cost, workdir=tmp_path)
    once, first = run(traced(), "speedup=1.1, tokens=64", ctx)
    again, second = run(traced(), "speedup=1.1, tokens=64", ctx)  # times differ, the choice does not

    assert patterns(once) == patterns(again)
    assert first.data == second.data
    assert ["choice.json"] == [path.name for path in (tmp_path / "choose-vm").iterdir()]


# Outputs: the manager compared them, `exact` --------------------------------------------------------------------------


def test_no_weight_and_no_node_is_changed() -> None:
    program = traced()
    done, _ = run(program, "density=0.5")

    assert [str(n) for n in program.module.graph.nodes] == [str(n) for n in done.module.graph.nodes]
    assert all(
        torch.equal(value, dict(done.module.named_parameters())[name])
        for name, value in program.module.named_parameters()
    )
    assert "exact" == ChooseVM.equivalence


# In a compile ---------------------------------------------------------------------------------------------------------


def test_the_stored_recipe_holds_the_choice_and_replays_bit_for_bit(tmp_path: Path) -> None:
    """The layer that was set by hand wins in both."""
    inputs, first, second = {"x": random(64, 128)}, tmp_path / "a.sparsec", tmp_path / "b.sparsec"
    options = Options(measure_speed=False)
    passes = f'choose-vm{{candidates="{CANDIDATES}", density=0.5}} | mask | freeze'
    asked = {"layers.0.weight": "2:8"}
    artifact = compile(made(Stack), inputs, out=first, targets=asked, passes=passes, options=options)
    stored = Recipe.read(first / "manifest.json")
    compile(made(Stack), inputs, out=second, targets=stored.targets, passes=stored.passes, options=options)

    assert "mask | freeze" == stored.passes
    assert "2:8" == stored.targets["layers.0.weight"]
    assert {"ignore", "2:4", "1:4", "16:2:8", "2:8"} >= set(stored.targets.values())
    assert "choose-vm" in artifact.manifest["passes"][0]["pass"]
    for name in ("graph.json", "weights.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    sites = [json.loads((one / "manifest.json").read_text())["sites"] for one in (first, second)]
    assert [site["pattern"] for site in sites[0]] == [site["pattern"] for site in sites[1]]
