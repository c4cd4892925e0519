"""Solved sites on disk: interrupted work goes on, and what does not fit is refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from core.oneshot.test_engine import Stack, batches, traced, weights
from models import made, random
from torch import Tensor, nn

from sparsec import Program
from sparsec.errors import ArtifactError
from sparsec.mapping import release
from sparsec.oneshot import teams
from sparsec.oneshot.engine import Result, prune
from sparsec.oneshot.journal import Entry, Journal
from sparsec.oneshot.solving import Method, Solver
from sparsec.pattern import Pattern
from sparsec.pipeline import Progress, no_progress

SITES = [f"layers.{i}.weight" for i in range(3)]


def run(
    folder: Path | None, progress: Progress = no_progress, method: Method | None = None, pattern: str = "4:2:5"
) -> tuple[Program, Result]:
    program = traced(made(Stack), 20, 8, pattern=pattern).clone()
    journal = Journal(folder) if folder else None
    result = prune(program, list(program.sites), batches(20, 8), method or Method(), 0, progress, journal)
    return program.with_sites(result.sites.values()), result


class Big(nn.Module):
    """One layer of several pages."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Stopped(Exception):  # noqa: N818  no error: somebody pressed a key
    pass


def stop_at(site: int) -> Progress:
    def progress(task: str, done: int, total: int) -> None:
        if done == site:
            raise Stopped

    return progress


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    program, result = run(tmp_path / "journal")
    for name in SITES:
        site = result.sites[name]
        entry = Journal(tmp_path / "journal").read(site)
        assert entry is not None and entry.bias is not None and site.selection is not None
        assert torch.equal(site.read(program.module), entry.weight)
        assert all(
            torch.equal(site.selection.tensors()[key], value) for key, value in entry.selection.tensors().items()
        )
        assert (site.retained, result.errors[name]) == (entry.retained, entry.error)
        assert torch.equal(weights(program)[name.replace("weight", "bias")], entry.bias)


@pytest.mark.parametrize("text", ["2:4", "4:2:5+2:4"])
def test_what_is_kept_lies_in_the_file_and_is_what_was_given(text: str, tmp_path: Path) -> None:
    program = traced(made(Big), 20, 64, pattern=text)
    site = program.sites["layer.weight"]
    weight = site.read(program.module).detach()
    pattern = Pattern.parse(text)
    selection, mask = pattern.choose(weight.abs())
    given = Entry(weight * mask, selection, random(64), 0.7, None, "a note")
    kept = Journal(tmp_path).keep(site, given)

    assert torch.equal(given.weight, kept.weight)
    assert torch.equal(mask, pattern.mask(kept.selection, 64))
    assert given.bias is not None and kept.bias is not None and torch.equal(given.bias, kept.bias)
    assert (0.7, None, "a note") == (kept.retained, kept.error, kept.note)
    if not sys.platform.startswith("linux"):
        return
    assert 0 == release(given.weight)  # it is in memory of its own
    assert release(kept.weight) > 0  # its pages are the file's, and can be given back
    assert torch.equal(given.weight, kept.weight)


def test_no_part_of_a_file_is_left(tmp_path: Path) -> None:
    run(tmp_path)

    assert sorted(f"{name}.safetensors" for name in SITES) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [0, 1, 2, 3])
@pytest.mark.parametrize("solver", ["sparsegpt", "alps"])
def test_interrupted_work_ends_bit_identical_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solver: Solver, stopped: int
) -> None:
    whole, expected = run(None, method=Method(solver))
    with pytest.raises(Stopped):
        run(tmp_path, stop_at(stopped), Method(solver))
    assert stopped == len(list(tmp_path.iterdir()))
    solved, real = [], teams.solve

    def counted(*args: object) -> object:
        solved.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(teams, "solve", counted)
    resumed, result = run(tmp_path, method=Method(solver))

    assert 3 - stopped == len(solved)
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
    assert (expected.errors, expected.notes) == (result.errors, result.notes)
    for name in SITES:
        before, after = expected.sites[name].selection, result.sites[name].selection
        assert before is not None and after is not None
        assert all(torch.equal(table, after.tensors()[key]) for key, table in before.tensors().items())
        assert expected.sites[name].retained == result.sites[name].retained


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bit"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    run(tmp_path)
    path = tmp_path / f"{SITES[1]}.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "bit":
        data[0] ^= 0xFF
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello", "bit": data}[damage])

    with pytest.raises(ArtifactError, match=r"layers\.1\.weight\.safetensors cannot be read .*; delete it and resume"):
        run(tmp_path)


def test_a_file_of_another_site_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / f"{SITES[1]}.safetensors").write_bytes((tmp_path / f"{SITES[0]}.safetensors").read_bytes())

    with pytest.raises(ArtifactError, match=r"layers\.1\.weight\.safetensors is not of layers\.1\.weight"):
        run(tmp_path)


def test_a_file_of_another_pattern_is_refused(tmp_path: Path) -> None:
    run(tmp_path)

    with pytest.raises(ArtifactError, match=r"layers\.0\.weight\.safetensors: a selection of 2:4 must hold"):
        run(tmp_path, pattern="2:4")


def test_a_file_without_its_words_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    run(tmp_path)
    path = tmp_path / f"{SITES[0]}.safetensors"
    for words in ({}, {"entry": "[]"}, {"entry": "{}"}, {"entry": "no json"}):
        save_file(load_file(path), path, words)
        with pytest.raises(ArtifactError, match=r"layers\.0\.weight\.safetensors cannot be read"):
            run(tmp_path)
