"""The imp pass prunes round by round; what rounds do to the optimizer and to weights is tested with it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
from training_models import check, context, engine, loop, run, task, wide

from sparsec import PassManager
from sparsec.errors import PatternError, RecipeError, UsageError
from sparsec.passes.imp import Imp
from sparsec.pattern import Pattern
from sparsec.training.loop import Loop
from sparsec.training.parts import Clock, Method
from sparsec.training.rounds import Left, Rounds, bounds
from sparsec.training.trainer_callback import trainer_callback
from sparsec.training.updates import Hard

OPTIONS = "epochs=4, lr=0.01, weight_decay=0.1"  # 24 steps


def slow(case: object) -> Any:
    return pytest.param(case, marks=pytest.mark.slow)


def by_steps(rewind: str, pattern: str = "unstructured:0.5", **options: float) -> Loop:
    method = Imp(rewind=rewind, step=0.25, every=0.25).method()  # type: ignore[arg-type]
    return loop(method, pattern, weight_decay=0.0, **options)


def test_weights_are_pruned_round_by_round_by_hand() -> None:
    method = Method(Rounds(0.25, 0.25), Hard(), Left())
    made, parameter = engine([[1.0, -2, 3, -4, 5, -6, 7, -8]], "unstructured:0.5", method)
    made.begin(4, 4)
    assert "mask" not in made.sites[0].tensors

    made.post_step()
    assert [[0, 0, 1, 1, 1, 1, 1, 1]] == made.sites[0].tensors["mask"].int().tolist()
    with torch.no_grad():
        parameter.copy_(torch.tensor([[9.0, 9, 4, 3, 5, 6, 0, 8]]))  # the first two are pruned, whatever they become
    made.post_step()
    assert [[0, 0, 1, 0, 1, 1, 0, 1]] == made.sites[0].tensors["mask"].int().tolist()
    made.post_step()
    made.post_step()
    made.end()
    assert [[0, 0, 4, 0, 5, 6, 0, 8]] == parameter.tolist()
    assert [[1, 0.75], [2, 0.5], [3, 0.5], [4, 0.5]] == made.curves["density"]


@pytest.mark.parametrize(
    ("pattern", "densities"),
    [
        ("2:4", [1.0, 1.0, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5]),
        ("unstructured:0.75", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.25]),
        ("16:2:8", [1.0] * 7 + [0.317] * 2),  # tails keep more
    ],
)
def test_density_falls_by_a_step_a_round_and_what_is_pruned_never_returns(pattern: str, densities: list[float]) -> None:
    made = loop(Imp(rewind="none").method(), pattern, epochs=5)  # 30 steps, 3 a round
    masks = []
    for step in range(3, 31, 3):
        made.run(step)
        masks.append([one.tensors["mask"] for one in made.engine.sites])

    assert pytest.approx(densities, abs=0.01) == [value for _, value in made.engine.curves["density"]][: len(densities)]
    for before, after in itertools.pairwise(masks):
        assert all(bool((old | ~new).all()) for old, new in zip(before, after, strict=True))
    assert all(map(torch.equal, masks[-1], masks[-2]))


@pytest.mark.parametrize("rewind", ["none", "initial"])
@pytest.mark.parametrize(
    "pattern", ["1:4", "16:2:8", slow("16:2:6@strip"), slow("4:2:5+2:4"), slow("unstructured:0.9")]
)
def test_it_ends_exactly_in_the_pattern(pattern: str, rewind: str) -> None:
    keep = "best" if rewind == "initial" else "last"
    done, report = run(f"imp{{{OPTIONS}, rewind={rewind}, keep={keep}}}", wide({"*": pattern}), context(eval=task()))

    check(done, pattern)
    assert pytest.approx(1 - report.data["zeros"]) == report.data["curves"]["density"][-1][1]
    assert 4 == len(report.data["evaluation"])


def test_without_rewinding_weights_stay_and_the_optimizer_begins_anew() -> None:
    made = by_steps("none")
    made.run(3)  # of 12: the first round is over, and what is judged and kept now is what was trained
    site = made.engine.sites[0]
    trained = site.parameter.detach().clone()
    assert 3 == int(made.optimizer.state[site.parameter]["step"])
    made.run(4)

    assert 1 == int(made.optimizer.state[site.parameter]["step"])
    assert 0 < float((trained - site.parameter.detach()).abs().max()) < 0.011  # one step of Adam at the full rate 0.01
    assert pytest.approx([0.01, 0.01 / 3, 0.01, 0.01 / 6]) == [made.rate(step) for step in (0, 2, 6, 11)]


def test_rewinding_puts_back_all_parameters_but_what_is_pruned() -> None:
    made = by_steps("initial")
    given = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made.run(6)
    trained = {name: value.detach().clone() for name, value in made.model.named_parameters()}
    made.settings = dataclasses.replace(made.settings, lr=1e-12)
    made.run(7)

    found = dict(made.model.named_parameters())
    for name, first in given.items():
        assert torch.allclose(first, found[name], rtol=0, atol=1e-9)
        assert not torch.allclose(trained[name], found[name], rtol=0, atol=1e-4)
    for site in made.finish().sites.sparse:  # what is kept was largest in the trained weights, not in those given
        name = f"graph.{site.name}"
        kept = found[name].detach() != 0
        assert 120 == int(kept.sum())
        assert torch.equal(given[name][kept], found[name].detach()[kept])
        largest = given[name].abs() >= given[name].abs().flatten().kthvalue(121).values
        assert not torch.equal(largest, kept)


@pytest.mark.parametrize("rewind", ["none", "initial"])
@pytest.mark.parametrize("at", [3, slow(4), 6, slow(10)])
def test_a_training_that_goes_on_from_its_state_ends_with_the_same_bits(at: int, rewind: str) -> None:
    whole, begun, resumed = (by_steps(rewind) for _ in range(3))
    whole.run()
    begun.run(at)
    resumed.load_state(*copy.deepcopy(begun.state_dict()))
    resumed.run()

    assert whole.losses == resumed.losses
    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_rounds_are_cut_where_patterns_change() -> None:
    sites = [wide({"*": text}).sites.sparse[0] for text in ("2:4", "16:2:8")]

    assert (0, 30, 50, 80, 100) == bounds(Rounds(), sites, Clock(100, 10))
    assert (0, 30, 50, 100) == bounds(Rounds(), sites[:1], Clock(100, 10))
    assert (0, 20, 40, 60, 80, 100) == bounds(
        Rounds(0.2, 0.2), [wide({"*": "unstructured:0.8"}).sites.sparse[0]], Clock(100, 10)
    )


@pytest.mark.parametrize(
    ("pattern", "options", "said"),
    [
        (
            "unstructured:0.95",
            "",
            r"up\.weight: unstructured:0\.95 is reached after 10 rounds, .* set every to 0\.0909",
        ),
        ("2:4", "step=0.01", r"2:4 is reached after 50 rounds, each prunes step=0\.01 of all weights"),
    ],
)
def test_rounds_that_do_not_fit_are_refused(pattern: str, options: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        run(f"imp{{{', '.join(filter(None, ['epochs=4', options]))}}}", wide({"*": pattern}))
    assert 10 == Rounds().rounds(Pattern.parse("unstructured:0.95"))


def test_a_training_of_less_than_a_step_a_round_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a round has no step: every=0\.1 of 6 steps"):
        run("imp{epochs=1, pattern=2:4}")


def test_a_selected_program_is_refused() -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())

    with pytest.raises(RecipeError, match="every site is selected already, so imp has no weights to choose"):
        run("imp{epochs=2}", masked)


@pytest.mark.parametrize("options", ["step=0", "step=1", "every=0", "every=1.5", "rewind=all"])
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"pass imp: {options.partition('=')[0]}"):
        PassManager.parse(f"imp{{{options}}}")


def test_a_trainer_that_cannot_begin_anew_is_refused() -> None:
    made, _ = engine([[1.0, 2, 3, 4]], "2:4", Imp().method())

    with pytest.raises(UsageError, match="begins anew after every round"):
        trainer_callback(made)
    assert "lossy" == Imp.equivalence
