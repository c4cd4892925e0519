"""What explain tells about every site and the whole model, with a backend whose speed is a formula."""

from __future__ import annotations

import json

import pytest
import torch
from fake_backend import Formula
from models import Encoder, Gated, made, random

from sparsec import Program, trace
from sparsec.cost import MOST_TOKENS
from sparsec.errors import UsageError
from sparsec.explain import explain


@pytest.fixture(scope="module")
def program() -> Program:
    ids = torch.arange(6).view(2, 3)
    return trace(made(Encoder), {"tokens": ids}, {"tokens": {0: "batch", 1: "length"}})


def gated() -> Program:
    return trace(made(Gated), {"x": random(3, 4)}, {"x": {0: "batch"}})


def test_every_site_is_eligible_or_not_with_its_reason_speed_and_memory(program: Program) -> None:
    up = next(site.name for site in program.sites if site.role == "ffn.up")
    found = explain(program, Formula(without=(up,)), {"2:4": {"*": "2:4"}}, (2, 8))

    sites = {site["role"]: site["variants"]["2:4"] for site in found["sites"]}
    assert [site.name for site in program.sites] == [site["name"] for site in found["sites"]]
    assert ("dense", None) == (sites["pooler"]["kernel"], sites["pooler"]["pattern"])
    assert "--include-pooler" in sites["pooler"]["reason"]
    assert "no kernel" == sites["ffn.up"]["reason"]
    assert "speed" not in sites["ffn.up"]
    assert {"2", "8"} == sites["ffn.down"]["speed"].keys()
    assert MOST_TOKENS == sites["ffn.down"]["break_even_tokens"]
    assert 4 * 8 + 4 == sites["attention.query"]["nbytes"]  # 8 values, and 2 bits for each, rounded up by row
    assert "reason" in found["exclusions"][0]
    json.dumps(found)


def test_each_variant_has_a_row_for_every_token_count_it_could_reach(program: Program) -> None:
    variants = {"2:4": {"*": "2:4"}, "1:4": {"*": "1:4"}}
    found = explain(program, Formula(), variants, (2, 8))

    assert [("2:4", 2), ("2:4", 8), ("1:4", 2), ("1:4", 8)] == [(r["variant"], r["tokens"]) for r in found["whole"]]
    for row in found["whole"]:
        assert row["speed"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert 1 < row["speed"] < row["limit"] == pytest.approx(1 / row["rest_share"])
    assert 2 == len(found["words"].splitlines())


def test_the_table_is_calibrated_for_what_was_asked_and_named_as_what_it_is() -> None:
    backend = Formula()
    found = explain(gated(), backend, {"2:4": {"*": "2:4"}}, (1,))

    assert ["2:4"] == [str(pattern) for pattern in backend.calibrated]
    assert "measured" == found["basis"]


def test_measuring_times_each_shape_once_and_no_table() -> None:
    backend = Formula()
    explain(gated(), backend, {p: {"*": p} for p in ("2:4", "1:4")}, (3,), measure=True)

    assert [] == backend.calibrated
    assert [((1, 4, 6), (3,)), ((1, 6, 4), (3,))] == sorted(backend.measured)


def test_nothing_is_pruned(program: Program) -> None:
    before = {name: value.clone() for name, value in program.module.state_dict().items()}
    text = program.dump()
    explain(program, Formula(), {"2:4": {"*": "2:4"}}, (2,))

    assert text == program.dump()
    for name, value in program.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_request_that_leaves_nothing_sparse_is_an_error(program: Program) -> None:
    with pytest.raises(UsageError, match="nothing to predict"):
        explain(program, Formula(), {"as asked": {"*": "ignore"}}, (2,))
