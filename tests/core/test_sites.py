"""Targets reach the sites they name, and a selector that reaches none is an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import Classifier, Encoder, Residual, made, random

from sparsec import trace
from sparsec.errors import PatternError, UsageError
from sparsec.pattern import NM, VNM
from sparsec.sites import Site, SiteTable
from sparsec.view import WeightView


def site(name: str, **fields: Any) -> Site:
    return Site(**{"name": name, "view": WeightView((0, 1), (4, 4)), "users": ("linear",), "role": "linear", **fields})


TABLE = SiteTable((site("a.fc1.weight"), site("a.fc2.weight"), site("pooler.weight", role="pooler", excluded="small")))


def patterns(table: SiteTable) -> list[str]:
    return [str(one.pattern) for one in table]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ({}, ["None", "None", "None"]),
        ({"*": "2:4"}, ["2:4", "2:4", "None"]),
        ({"*": "2:4", "a.fc2.weight": "64:2:5"}, ["2:4", "64:2:5", "None"]),
        ({"a.fc2.weight": "64:2:5", "*": "2:4"}, ["2:4", "2:4", "None"]),
        ({"*": "2:4", "re:fc2": "ignore"}, ["2:4", "None", "None"]),
        ({"re:fc2": "ignore", "*": "2:4"}, ["2:4", "None", "None"]),
        ({"*": "2:4", "re:fc[12]": "1:4"}, ["1:4", "1:4", "None"]),
        ({"pooler.weight": "2:4"}, ["None", "None", "2:4"]),
        ({"re:.*": "2:4"}, ["2:4", "2:4", "2:4"]),
        ({"*": "2:4", "re:fc1": "dense"}, ["None", "2:4", "None"]),
        ({"*": "4:4"}, ["None", "None", "None"]),
    ],
)
def test_later_targets_win(targets: dict[str, str], expected: list[str]) -> None:
    assert expected == patterns(TABLE.with_targets(targets))


def test_what_is_dense_says_why() -> None:
    table = TABLE.with_targets({"*": "2:4", "re:fc1": "ignore", "a.fc2.weight": "dense"})

    assert ["ignored by 're:fc1'", "dense by 'a.fc2.weight'", "small"] == [one.excluded for one in table]


def test_a_role_can_be_included() -> None:
    assert ["2:4"] * 3 == patterns(TABLE.with_targets({"*": "2:4"}, include=("pooler",)))


def test_a_table_is_not_changed_by_targets() -> None:
    TABLE.with_targets({"*": "2:4"})

    assert ["None"] * 3 == patterns(TABLE)


@pytest.mark.parametrize("selector", ["fc1", "re:fc3", "a.fc1", "", "re:^fc"])
def test_a_selector_that_matches_nothing_is_an_error(selector: str) -> None:
    with pytest.raises(UsageError, match=r"matches none of the 3 sites; their names look like a\.fc1\.weight"):
        TABLE.with_targets({"*": "2:4", selector: "2:4"})


def test_a_star_that_matches_nothing_says_why() -> None:
    excluded = SiteTable((site("head.weight", excluded="the head"),))

    with pytest.raises(UsageError, match=r"no site is left for 2:4: all 1 are excluded \(head\.weight: the head\)"):
        excluded.with_targets({"*": "2:4"})
    with pytest.raises(UsageError, match="no linear weight"):
        SiteTable().with_targets({"*": "2:4"})


def test_a_bad_expression_or_pattern_is_refused() -> None:
    with pytest.raises(UsageError, match="'re:\\(' is not a regular expression"):
        TABLE.with_targets({"re:(": "2:4"})
    with pytest.raises(PatternError, match="banana"):
        TABLE.with_targets({"*": "banana"})


def test_a_site_holds_one_pattern_for_good() -> None:
    selection = NM(2, 4).project(torch.ones(4, 4))
    table = SiteTable((site("fc.weight", pattern=NM(2, 4), selection=selection),))

    assert table.sites == table.with_targets({"*": "2:4"}).sites
    with pytest.raises(PatternError, match=r"already holds 2:4; .* found also 64:2:5"):
        table.with_targets({"*": "64:2:5"})


def test_a_table_is_indexed_by_name_and_replaced_by_name() -> None:
    table = TABLE.replace([TABLE["a.fc2.weight"].replace(pattern=VNM(4, 2, 5))])

    assert ["None", "4:2:5", "None"] == patterns(table)
    assert ("a.fc2.weight",) == tuple(one.name for one in table.sparse)
    assert 3 == len(table)
    with pytest.raises(KeyError, match="nowhere"):
        table["nowhere"]


def test_a_site_reads_its_weight_as_batch_rows_cols() -> None:
    program = trace(made(Classifier), (random(2, 5),))
    weight = program.sites["body.weight"].read(program.module)

    assert (1, 8, 5) == tuple(weight.shape)
    assert not weight.requires_grad
    assert torch.equal(made(Classifier).body.weight, weight[0])


def test_sites_come_in_the_order_of_the_graph() -> None:
    encoder = trace(made(Encoder), (torch.zeros(2, 3, dtype=torch.int64),))

    assert ["query", "key", "value", "out", "up", "down", "pooler"] == [s.name.split(".")[0] for s in encoder.sites]
    assert ["up", "down"] == [s.name.split(".")[0] for s in trace(made(Residual), (random(2, 5),)).sites]
