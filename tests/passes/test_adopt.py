"""The adopt pass makes the zeros that are there the selection, and changes no weight."""

from __future__ import annotations

import functools

import pytest
import torch
from models import made as seeded
from models import random
from torch import Tensor, nn

from sparsec import PassManager, trace
from sparsec.errors import PatternError, UsageError
from sparsec.program import Program


class Block(nn.Module):
    """Wide enough for groups and tails of every usual pattern."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(64, 80), nn.Linear(80, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.relu(self.up(x))))


@functools.cache
def dense() -> Program:
    return trace(seeded(Block), (random(2, 64),))


def pruned(*patterns: str) -> Program:
    """A model that somebody pruned, `up` and `down`: exact zeros, and no table says so."""
    names = ("up.weight", "down.weight")
    targets = dict(zip(names, patterns * (3 - len(patterns)), strict=False))
    before = dense()
    made = PassManager.parse("mask | freeze").run(before.replace(sites=before.sites.with_targets(targets)))
    sites = [made.sites[name].replace(pattern=None, selection=None, excluded=None, retained=None) for name in names]
    return made.with_sites(sites).replace(facts=frozenset({"traced"}))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:5"])
def test_zeros_become_the_selection_of_the_pattern_they_follow(pattern: str) -> None:
    before = pruned(pattern)
    done, (report,) = PassManager.parse("adopt").run_reported(before, check="outputs")

    assert {"adopted": 2, "patterns": {pattern: 2}} == report.data
    for site in done.sites.sparse:
        assert site.pattern is not None and site.selection is not None
        weight = site.read(done.module)
        assert torch.equal(before.sites[site.name].read(before.module), weight)
        assert 0 == site.pattern.violations_of(weight, site.selection).count
    assert "frozen" in done.facts


@pytest.mark.parametrize("pattern", ["16:2:8", "4:2:5+2:4"])
def test_a_pattern_that_is_asked_for_is_found_in_the_zeros(pattern: str) -> None:
    before = pruned(pattern)
    done = PassManager.parse("adopt").run(before.replace(sites=before.sites.with_targets({"*": pattern})))

    assert {pattern} == {str(site.pattern) for site in done.sites.sparse}


def test_zeros_of_no_usual_pattern_are_unstructured_and_all_stay() -> None:
    before = pruned("unstructured:0.7")
    done = PassManager.parse("adopt").run(before)

    for site in done.sites.sparse:
        assert str(site.pattern).startswith("unstructured:0.7")
        assert torch.equal(before.sites[site.name].read(before.module), site.read(done.module))


def test_a_dense_site_stays_dense_with_the_reason() -> None:
    done, (report,) = PassManager.parse("adopt").run_reported(pruned("2:4", "dense"))
    reasons = {note.site: note.text for note in report.notes}

    assert ["up.weight"] == [site.name for site in done.sites.sparse]
    assert {"down.weight", "head.weight"} == reasons.keys()
    assert "no zeros to adopt" == reasons["down.weight"]
    assert done.sites["down.weight"].excluded == "it has no zeros to adopt"
    with pytest.raises(UsageError, match=r"no site has zeros to speak of.*--weights"):
        PassManager.parse("adopt").run(dense())


def test_a_pattern_that_the_zeros_break_is_an_error_with_the_place() -> None:
    before = pruned("4:8")
    with pytest.raises(PatternError, match=r"pass adopt: up.weight does not follow 2:4: .*leave out the pattern"):
        PassManager.parse("adopt").run(before.replace(sites=before.sites.with_targets({"*": "2:4"})))


def test_a_second_run_changes_nothing() -> None:
    once = PassManager.parse("adopt").run(pruned("2:4"))
    twice, (report,) = PassManager.parse("adopt").run_reported(once)

    assert once.dump(hashes=True) == twice.dump(hashes=True)
    assert {"adopted": 0, "patterns": {}} == report.data
