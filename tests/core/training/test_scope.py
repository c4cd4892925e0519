"""One budget for all unstructured sites."""

from __future__ import annotations

from pathlib import Path

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_models import Wide, engine, loop, run, task, wide

import sparsec
from sparsec.pattern import Unstructured
from sparsec.training.criteria import Platon, Seven
from sparsec.training.parts import Magnitude, Method, Tracked
from sparsec.training.regrowth import Zeroed
from sparsec.training.schedules import Cubic
from sparsec.training.scope import keeping, nth_largest, shares
from sparsec.training.updates import Hard

floats = st.floats(0, 2.0**120, width=32)


def tracked(weight: list[list[float]], name: str) -> Tracked:
    site = engine(weight, "unstructured:0.5", Method(Cubic(), Hard()))[0].sites[0].site
    return Tracked(site.replace(name=name), nn.Parameter(torch.tensor(weight)))


@settings(max_examples=25)
@given(st.lists(st.lists(floats, min_size=1, max_size=9), min_size=1, max_size=4), st.data())
def test_the_nth_largest_is_that_of_a_sorted_list(values: list[list[float]], data: st.DataObject) -> None:
    together = sorted((value for part in values for value in part), reverse=True)
    n = data.draw(st.integers(1, len(together)))

    assert together[n - 1] == nth_largest([torch.tensor(part) for part in values], n)


@given(st.integers(2, 10**7), st.data())
def test_a_share_keeps_exactly_so_many_and_is_read_back(of: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, of - 1))
    pattern = keeping(kept, of)

    assert kept == pattern.kept(1, of)
    assert pattern == sparsec.Pattern.parse(str(pattern))


def test_budgets_follow_the_scores_and_ties_the_order() -> None:
    sites = [tracked([[9.0, 8.0], [7.0, 1.0]], "a"), tracked([[1.0, 1.0], [0.5, 0.1]], "b")]
    asked = {"a": Unstructured(0.5), "b": Unstructured(0.5)}
    found = shares(sites, asked, Magnitude())

    # 4 of 8 are kept: 9, 8, 7, and of three equal ones the first, which would empty b: each keeps at least one.
    assert {"a": "unstructured:0.25", "b": "unstructured:0.75"} == {name: str(p) for name, p in found.items()}
    asked["b"] = Unstructured(0.25)
    found = shares(sites, asked, Magnitude())
    assert [3, 1] == [found[name].kept(2, 2) for name in "ab" if isinstance(found[name], Unstructured)]


def test_other_patterns_have_no_share() -> None:
    sites = [tracked([[9.0, 8.0], [7.0, 1.0]], "a"), tracked([[1.0, 1.0], [0.5, 0.1]], "b")]

    assert {} == shares(sites, {"a": None, "b": sparsec.Pattern.parse("1:2")}, Magnitude())


@pytest.mark.parametrize("text", ["seven-pre{epochs=1", "seven-dyn{epochs=2, every=2", "platon{epochs=2, every=1"])
def test_globally_the_whole_is_as_sparse_as_asked_and_sites_differ(text: str) -> None:
    done, report = run(f"{text}, lr=0.01}}", wide({"*": "unstructured:0.75"}))
    patterns = {str(site.pattern) for site in done.sites.sparse}

    assert 0.75 == report.data["zeros"]
    assert 2 == len(patterns)
    for site in done.sites.sparse:
        assert isinstance(site.pattern, Unstructured) and site.selection is not None
        assert site.pattern.kept(*site.shape[1:]) == int((site.read(done.module) != 0).sum())


def test_a_site_with_groups_beside_keeps_its_own_pattern() -> None:
    done, _ = run("platon{epochs=2, every=2}", wide({"up.weight": "2:4", "down.weight": "unstructured:0.75"}))

    assert ["2:4", "unstructured:0.75"] == [str(site.pattern) for site in done.sites.sparse]


def test_shared_budgets_become_an_artifact_of_small_tables_and_dense_kernels(tmp_path: Path) -> None:
    passes = "seven-dyn{epochs=2, every=2, lr=0.01}"
    done, _ = run(passes, wide({"*": "unstructured:0.75"}))
    artifact = sparsec.compile(
        models.made(Wide),
        (models.random(2, 12),),
        out=tmp_path / "made",
        pattern="unstructured:0.75",
        passes=passes,
        resources={"train": task()},
        options=sparsec.Options(measure_speed=False),
    )
    x = models.random(2, 12)
    with torch.no_grad():
        expected, found = done(x)["logits"], artifact.load()(x=x)["logits"]

    assert torch.allclose(expected, found, rtol=0, atol=1e-5 * float(expected.abs().max()))
    stored = {site["name"]: site["pattern"] for site in artifact.manifest["sites"] if site["pattern"]}
    assert {site.name: str(site.pattern) for site in done.sites.sparse} == stored
    assert all(check.ok for check in artifact.verify())


@pytest.mark.parametrize(
    "method",
    [
        Method(Cubic(0.0, 0.6, 2), Hard(), Seven(), scope="global"),
        Method(Cubic(0.0, 0.6, 2), Zeroed(), Platon(window=2), scope="global"),
    ],
)
@pytest.mark.parametrize("at", [3, pytest.param(9, marks=pytest.mark.slow)])
def test_shares_are_those_of_a_training_that_was_never_stopped(method: Method, at: int) -> None:
    whole, begun, resumed = (loop(method, "unstructured:0.75") for _ in range(3))
    whole.run()
    begun.run(at)
    resumed.load_state(*begun.state_dict())
    resumed.run()

    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_the_program_on_the_way_is_as_sparse_as_the_one_at_the_end() -> None:
    made = loop(Method(Cubic(0.0, 0.6, 2), Hard(), Seven(), scope="global"), "unstructured:0.75")
    made.run(3)
    before: list[Tensor] = [site.parameter.detach().clone() for site in made.engine.sites]
    with made.engine.pruned():
        kept = sum(int((site.parameter != 0).sum()) for site in made.engine.sites)

    assert sum(weight.numel() for weight in before) == 4 * kept
    assert all(map(torch.equal, before, [site.parameter.detach() for site in made.engine.sites]))
