"""`sparsec opt` as compiler people use it: text on stdout, times on stderr, requests checked before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from models import Classifier, made, random
from typer.testing import CliRunner, Result

from sparsec import Program, store, trace
from sparsec.cli import app

MASK, FREEZE = "mask{pattern=3:2:5}", "freeze"


@pytest.fixture(autouse=True)
def _with_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    trace(made(Classifier), (random(3, 5),)).save(tmp_path / "p")


def opt(passes: str, *args: str, program: str = "p", code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["opt", program, "--passes", passes, *args])
    assert code == result.exit_code, result.output
    return result


def refused(passes: str, *args: str, program: str = "p", code: int = 2) -> str:
    result = opt(passes, *args, program=program, code=code)
    assert "" == result.stdout
    assert 1 == len(result.stderr.strip().splitlines())
    return result.stderr


def test_the_result_is_printed_with_hashes_and_the_seconds_of_each_pass_apart() -> None:
    result = opt(f"{MASK} | {FREEZE}")

    assert result.stdout.startswith("program Classifier  facts: frozen, selected, traced\n")
    assert 4 == result.stdout.count(" #")
    header, *lines = result.stderr.splitlines()
    assert ["pass", "seconds", "result", "notes"] == header.split()
    rows = {line.split()[0]: line.split() for line in lines if not line.startswith(" ")}
    assert [MASK, FREEZE] == list(rows)
    assert all(float(row[1]) >= 0 for row in rows.values())
    assert ["masked=1", "head.weight:", "the"] == rows[MASK][2:5]


def test_the_text_is_the_same_on_every_run_and_can_do_without_hashes() -> None:
    assert opt(MASK).stdout == opt(MASK).stdout
    plain = opt(MASK, "--no-hashes").stdout
    assert " #" not in plain
    assert plain == "".join(f"{line.partition(' #')[0]}\n" for line in opt(MASK).stdout.splitlines())


def titles(result: Result) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(("before", "after", "changed"))]


def test_dumps_are_printed_where_they_are_asked_for() -> None:
    passes = f"{MASK} | {FREEZE} | lower"

    assert [f"after {MASK}", f"after {FREEZE}", "after lower"] == titles(opt(passes, "--dump-after-each"))
    assert [f"before {FREEZE}"] == titles(opt(passes, "--dump-before", "freeze"))
    assert [f"after {FREEZE}"] == titles(opt(passes, "--dump-after", "freeze"))
    both = opt(passes, "--dump-before", "mask", "--dump-before", "lower", "--dump-after", "freeze")
    assert [f"before {MASK}", f"after {FREEZE}", "before lower"] == titles(both)


def test_a_dump_before_a_pass_is_the_dump_after_the_one_before_it() -> None:
    before = opt(f"{MASK} | {FREEZE}", "--dump-before", "freeze").stdout.partition("\n")[2]
    after = opt(f"{MASK} | {FREEZE}", "--dump-after", "mask").stdout.partition("\n")[2]

    assert before == after == opt(MASK).stdout


def test_a_difference_shows_what_all_passes_changed() -> None:
    lines = opt(f"{MASK} | {FREEZE}", "--diff").stdout.splitlines()

    assert [f"changed by {MASK} | {FREEZE}", f"--- before {MASK} | {FREEZE}", f"+++ after {MASK} | {FREEZE}"] == lines[
        :3
    ]
    changed = [line for line in lines[4:] if line[0] in "+-"]
    assert ["program", "site body.weight", "%body_weight = tensor @body.weight"] == [
        line[1:].strip()[: len(start)]
        for line, start in zip(
            changed[::2], ["program", "site body.weight", "%body_weight = tensor @body.weight"], strict=True
        )
    ]


def test_a_difference_shows_what_each_pass_changed() -> None:
    out = opt(f"{MASK} | {FREEZE}", "--diff", "--dump-after-each").stdout

    first, second = out.split(f"changed by {FREEZE}\n")
    assert "+  %body_weight_masked = aten.where.ScalarOther(%body_weight_mask, %body_weight, 0.0)" in first
    assert "-  %body_weight_masked = aten.where.ScalarOther(%body_weight_mask, %body_weight, 0.0)" in second
    assert "+  %body_weight = tensor @body.weight" not in first


def test_no_difference_is_said() -> None:
    opt(f"{MASK}", "-o", "q")

    assert "changed by mask\nnothing\n" == opt("mask", "--diff", program="q").stdout


def test_json_is_one_object_with_times_notes_and_data() -> None:
    result = opt(f"{MASK} | {FREEZE}", "--json", "-o", "q")
    data: dict[str, Any] = json.loads(result.stdout)

    assert "" == result.stderr
    assert ("p", "q", []) == (data["program"], data["out"], data["dumps"])
    assert ["frozen", "selected", "traced"] == data["facts"]
    assert [MASK, FREEZE] == [one["pass"] for one in data["passes"]]
    assert all(one["seconds"] >= 0 for one in data["passes"])
    assert {"masked": 1} == data["passes"][0]["data"]
    assert "head.weight" == data["passes"][0]["notes"][0]["site"]


def test_json_holds_the_dumps_that_are_asked_for() -> None:
    data = json.loads(opt(f"{MASK} | {FREEZE}", "--json", "--dump-before", "freeze", "--diff").stdout)

    assert [f"before {FREEZE}", f"changed by {MASK} | {FREEZE}"] == [one["title"] for one in data["dumps"]]
    assert data["dumps"][0]["text"] == opt(MASK).stdout


def test_passes_in_two_runs_give_the_files_of_one_run() -> None:
    opt(f"{MASK} | {FREEZE}", "-o", "whole")
    opt(MASK, "-o", "half")
    opt(FREEZE, "-o", "resumed", program="half")

    for name in ("graph.json", "weights.safetensors", "selections.safetensors", "manifest.json"):
        assert Path("whole", name).read_bytes() == Path("resumed", name).read_bytes(), name
    assert opt("mask", program="half").stdout == opt(MASK).stdout


def test_a_saved_program_can_be_verified_but_not_be_compiled_by_passes_it_has_had() -> None:
    opt(f"{MASK} | {FREEZE}", "-o", "q")

    assert 0 == CliRunner().invoke(app, ["verify", "q"]).exit_code
    again = ["compile", "q", "--pattern", "2:4", "--passes", "freeze", "-o", "z"]
    assert 2 == CliRunner().invoke(app, again).exit_code
    assert not Path("z").exists()


def test_what_is_printed_before_a_failing_pass_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.passes.freeze import Freeze

    monkeypatch.setattr(Freeze, "run", lambda self, program, ctx: None)
    result = opt(f"{MASK} | {FREEZE}", "--dump-after-each", "-o", "q", code=1)

    assert [f"after {MASK}"] == titles(result)
    assert f"sparsec: pass freeze (after {MASK}): run must return PassResult" in result.stderr
    assert not Path("q").exists()


@pytest.mark.parametrize("option", ["--dump-before", "--dump-after"])
def test_a_dump_at_a_pass_that_is_not_run_is_refused(option: str) -> None:
    assert f"{option} lower: no such pass is run; expected one of mask, freeze" in refused(
        "mask | freeze", option, "lower"
    )


def test_an_impossible_order_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.opt.load_model", lambda *_: pytest.fail("the model was loaded"))

    assert "frozen is established by freeze or oneshot: add it before lower" in refused(
        f"{MASK} | lower", "--dump-before", "mask"
    )
    assert "put mask before freeze" in refused(f"{FREEZE} | {MASK}", program="/nowhere/at/all")


def test_the_facts_of_a_saved_program_count_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    opt(f"{MASK} | {FREEZE} | lower", "-o", "q")
    monkeypatch.setattr("sparsec.opt.load_model", lambda *_: pytest.fail("the model was loaded"))

    assert "no pass establishes traced: start from a program that is traced" in refused(MASK, program="q")


def test_bad_requests_are_refused() -> None:
    assert "did you mean mask" in refused("msk")
    assert "exists already" in refused(MASK, "-o", "p")
    assert "is no folder here" in refused(MASK, program="/nowhere/at/all")
    assert 2 == CliRunner().invoke(app, ["opt", "p", "--passes", MASK, "--check", "everything"]).exit_code


def test_a_program_without_one_of_its_tensors_is_refused_by_name() -> None:
    tensors = store.load_tensors(Path("p", store.WEIGHTS))
    store.save_tensors(Path("p", store.WEIGHTS), {key: value for key, value in tensors.items() if key != "body.weight"})
    manifest = json.loads(Path("p", store.MANIFEST).read_text())
    store.seal(Path("p"), "sparsec-program", {key: value for key, value in manifest.items() if key != "files"})

    assert "weights.safetensors has no tensor 'body.weight'" in refused(MASK, code=1)


def test_what_opt_saves_is_what_it_printed() -> None:
    printed = opt(f"{MASK} | {FREEZE}", "-o", "q").stdout

    assert printed == Program.load("q").dump(hashes=True)
