"""A killed compile leaves finished parts, and --resume goes on from there: the same work, or none."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from models import Residual, made

import sparsec
from sparsec import Context, Pass, PassResult, Program, api, recipe, registry, resuming
from sparsec.errors import PassError, UsageError
from sparsec.pipeline import Equivalence

KEY = {"recipe": {"seed": 0, "targets": {"*": "2:4"}}, "threads": 2}
DONE: list[str] = []
"""What the pass below computed, in order, over all runs of a test."""


@dataclass(frozen=True)
class Slow(Pass):
    """Mask in two steps, of which each is kept; fail after as many new ones as the test says."""

    name: ClassVar[str] = "slow"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    equivalence: ClassVar[Equivalence] = "exact"

    fails_after: ClassVar[int] = 2
    error: ClassVar[BaseException] = PassError("no power")

    def run(self, program: Program, ctx: Context) -> PassResult:
        assert ctx.workdir is not None
        (ctx.workdir / self.name).mkdir(exist_ok=True)
        for done, step in enumerate(("first", "second")):
            if done == self.fails_after:
                raise self.error
            part = ctx.workdir / self.name / step
            if not part.exists():
                DONE.append(step)
                part.write_text(step)
        return PassResult(program)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Compile a small net with the slow pass, which another distribution is said to give."""
    DONE.clear()
    entries = {**registry.passes(), "slow": registry.Entry("slow", f"{__name__}:Slow", "elsewhere")}
    monkeypatch.setattr(registry, "passes", lambda: entries)
    monkeypatch.setattr(recipe, "passes", lambda: entries)
    load = registry._load
    monkeypatch.setattr(registry, "_load", lambda entry, kind: Slow if entry.name == "slow" else load(entry, kind))

    def compile(
        resume: bool = False,
        fails_after: int = 2,
        error: BaseException | None = None,
        seed: int = 0,
        weights: int = 0,
    ) -> None:
        monkeypatch.setattr(Slow, "fails_after", fails_after)
        monkeypatch.setattr(Slow, "error", error or PassError("no power"))
        options = api.Options(measure_speed=False, resume=resume)
        sparsec.compile(
            made(Residual, weights), [torch.zeros(2, 5)], pattern="2:4", passes="slow | mask | freeze", seed=seed,
            out=tmp_path / "x.sparsec", options=options,
        )  # fmt: skip

    return compile


def test_a_compile_that_failed_goes_on_where_it_was(compiling: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"no power.*--resume goes on from there"):
        compiling(fails_after=1)
    assert [".x.sparsec.work"] == os.listdir(tmp_path)

    compiling(resume=True)

    assert ["first", "second"] == DONE
    assert ["x.sparsec"] == os.listdir(tmp_path)


def test_without_resume_what_was_left_is_deleted(compiling: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(PassError):
        compiling(fails_after=1)
    compiling()

    assert ["first", "first", "second"] == DONE
    assert ["x.sparsec"] == os.listdir(tmp_path)


def test_an_interrupt_keeps_the_work_and_says_so(
    compiling: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(KeyboardInterrupt):
        compiling(fails_after=1, error=KeyboardInterrupt())

    assert "--resume goes on from there" in caplog.text
    compiling(resume=True)
    assert ["first", "second"] == DONE


def test_a_failure_that_left_nothing_leaves_no_folder(compiling: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(PassError) as caught:
        compiling(fails_after=0)

    assert "--resume" not in str(caught.value)
    assert [] == os.listdir(tmp_path)


def test_work_of_another_recipe_is_refused_with_what_differs(compiling: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(PassError):
        compiling(fails_after=1)

    with pytest.raises(UsageError, match=r"recipe\.seed was 0, is now 7"):
        compiling(resume=True, seed=7)
    compiling(resume=True)
    assert ["first", "second"] == DONE  # the refusal deleted nothing


def test_other_weights_are_another_work(compiling: Callable[..., None]) -> None:
    with pytest.raises(PassError):
        compiling(fails_after=1)

    with pytest.raises(UsageError, match=r"weights\.\S+ was [0-9a-f]{8}, is now"):
        compiling(resume=True, weights=1)


def test_resuming_nothing_starts_anew_and_says_so(
    compiling: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiling(resume=True)

    assert "nothing to resume" in caplog.text
    assert ["x.sparsec"] == os.listdir(tmp_path)


def test_two_compiles_to_one_place_do_not_mix(tmp_path: Path) -> None:
    out = tmp_path / "x.sparsec"
    with (
        resuming.working(out, KEY, resume=False) as folder,
        pytest.raises(UsageError, match="another compile works in"),
        resuming.working(out, KEY, resume=False),
    ):
        pass
    assert not folder.exists()


def test_a_file_that_changed_is_another_work(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("old")
    before = resuming.files_of({"model": str(model), "tokens": "", "passes": "mask | freeze"})
    (model / "weights").write_text("newer")

    assert [str(model / "weights")] == list(before)
    assert before != resuming.files_of([str(model)])


def test_a_damaged_key_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "x.sparsec"
    folder = resuming.folder_of(out)
    (folder / "part").mkdir(parents=True)
    (folder / "part/one").write_text("1")
    (folder / resuming.KEY).write_text("{")

    with (
        pytest.raises(UsageError, match=r"key\.json cannot be read .* start without --resume"),
        resuming.working(out, KEY, resume=True),
    ):
        pass


def test_the_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), resuming.working(tmp_path / "a/b/x.sparsec", KEY, resume=False):
        raise KeyError
    assert [] == os.listdir(tmp_path)


@pytest.fixture(autouse=True)
def _captured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "sparsec")
