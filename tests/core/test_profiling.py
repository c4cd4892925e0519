"""Profiles: every call is timed, what is left out is not run, and the program stays as it is."""

from __future__ import annotations

import torch
from models import VOCABULARY, Encoder, made

from sparsec import Program, trace
from sparsec.profiling import _without, low, profile


def traced() -> Program:
    ids = torch.arange(6).view(2, 3) % VOCABULARY
    return trace(made(Encoder), {"tokens": ids}, {"tokens": {0: "batch", 1: "length"}})


def test_each_call_has_seconds_and_the_vectors_it_gives() -> None:
    program = traced()
    users = {site.role: site.users[0] for site in program.sites}

    found = profile(program, (), {"tokens": torch.zeros(4, 5, dtype=torch.int64)}, 20, budget_seconds=0.01)

    assert 20 == found.tokens
    assert {n.name for n in program.module.graph.nodes if n.op == "call_function"} == found.nodes.keys()
    assert all(node.seconds > 0 for node in found.nodes.values())
    assert ("linear", 20) == (found.nodes[users["ffn.up"]].operation, found.nodes[users["ffn.up"]].rows)
    assert 4 == found.nodes[users["pooler"]].rows


def test_what_is_left_out_is_not_run_and_the_program_stays_as_it_is() -> None:
    program = traced()
    text, before = program.dump(), program(**program.inputs)
    users = {user for site in program.sites for user in site.users}
    values = {user: torch.ones(2, 3, 4) for user in users}

    left = _without(program, values)

    names = {node.name for node in left.graph.nodes}
    assert {node.name for node in program.module.graph.nodes if node.op == "call_function"} - users <= names
    assert not users & names
    profile(program, users, program.inputs, 6, budget_seconds=0)
    assert text == program.dump()
    torch.testing.assert_close(program(**program.inputs), before, rtol=0, atol=0)


def test_the_rest_is_never_more_than_the_whole() -> None:
    program = traced()
    users = {user for site in program.sites for user in site.users}
    found = profile(program, users, program.inputs, 6, budget_seconds=0.01)

    assert 0 < found.rest <= found.seconds


def test_low_is_where_the_fastest_fifth_ends() -> None:
    assert (1.0, 3.0) == (low([4.0, 1.0, 2.0]), low([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 10.0]))
