"""Checkpoints: whole or not there, never a bad one over a good one, and a stopped training goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_models import METHODS, context, loop, task, wide

from sparsec.errors import ArtifactError, TrainingError, UsageError
from sparsec.pipeline import Context, PassManager, PassReport
from sparsec.program import Program
from sparsec.training.checkpoints import PLAIN, TENSORS, Checkpoints, TerminatedError, stopping
from sparsec.training.engine import Engine
from sparsec.training.loop import Loop
from sparsec.training.parts import Method
from sparsec.training.schedules import Cubic
from sparsec.training.session import Session
from sparsec.training.updates import Hard

STATE = {"weight": torch.arange(6.0).reshape(2, 3)}, {"losses": [0.1, 1e-30], "step": 3}
OPTIONS = "pattern=2:4, lr=0.01, weight_decay=0.1"
STEPS = 12


@pytest.fixture
def kept(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "pass", seconds=1e9)


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, number: int, steps: int = STEPS) -> None:
    """Send this process a signal in the middle of a step, of a training of so many."""
    step = Engine.pre_step

    def pre_step(self: Engine) -> None:
        if self.clock.step == at and self.clock.steps == steps:
            os.kill(os.getpid(), number)
        step(self)

    monkeypatch.setattr(Engine, "pre_step", pre_step)


def trained(text: str, folder: Path | None, **resources: Any) -> tuple[Program, tuple[PassReport, ...]]:
    ctx = Context(resources={**context().resources, **resources}, workdir=folder)
    return PassManager.parse(text).run_reported(wide(), ctx)


# On disk --------------------------------------------------------------------------------------------------------------


def test_a_state_is_read_as_it_was_written_and_one_is_kept(kept: Checkpoints) -> None:
    assert kept.load() is None
    kept.save(({"weight": torch.zeros(1)}, {}), 1)
    kept.save(STATE, 20)
    assert kept.folder / "step-20" == kept.last()
    tensors, plain = kept.load() or ({}, {})

    assert torch.equal(STATE[0]["weight"], tensors["weight"])
    assert STATE[1] == plain
    assert ["step-20"] == os.listdir(kept.folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_state_with_what_is_no_number_is_not_written(kept: Checkpoints, value: float) -> None:
    kept.save(({"empty": torch.zeros(0), "mask": torch.ones(2, dtype=torch.bool), **STATE[0]}, {}), 3)
    kept.save(({"weight": torch.tensor([1.0, value, 2.0])}, {}), 4)

    assert 3 == kept.step


def test_what_a_killed_process_left_half_written_is_not_read_and_goes(kept: Checkpoints) -> None:
    kept.save(STATE, 3)
    (kept.folder / "step-9.part").mkdir()
    (kept.folder / "step-9.part" / TENSORS).write_text("half")

    assert 3 == kept.step
    kept.save(STATE, 9)
    assert ["step-9"] == os.listdir(kept.folder)


def test_of_two_checkpoints_the_later_is_read(kept: Checkpoints) -> None:
    """A process can be killed between renaming one and removing the other."""
    kept.save(STATE, 9)
    (kept.folder / "step-9").rename(kept.folder / "aside")
    kept.save(STATE, 10)
    (kept.folder / "step-9").mkdir()

    assert kept.folder / "step-10" == kept.last()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (TENSORS, lambda path: path.write_bytes(path.read_bytes()[:-4]), "state.safetensors was changed"),
        (TENSORS, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\7"), "state.safetensors was changed"),
        (TENSORS, Path.unlink, r"it cannot be read \(.*state.safetensors"),
        (PLAIN, lambda path: path.write_text(path.read_text()[:-9]), "it cannot be read"),
        (PLAIN, lambda path: path.write_text(path.read_text().replace("1e-30", "1e-31")), "state.json was changed"),
        (PLAIN, lambda path: path.write_text("[]"), "it cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(kept: Checkpoints, name: str, damage: Any, message: str) -> None:
    kept.save(STATE, 3)
    damage(kept.folder / "step-3" / name)

    with pytest.raises(ArtifactError, match=rf"step-3 is damaged: .*{message}.*; delete .*pass and resume again"):
        kept.load()


def test_a_checkpoint_is_due_after_its_time_or_an_epoch_but_for_two_percent_at_most(
    kept: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("sparsec.training.checkpoints.time.monotonic", lambda: now[0])
    made = Checkpoints(kept.folder, seconds=60)
    found = []
    for now[0] in (1.0, 59.0, 60.0):
        found.append((made.due(False), made.due(True)))
    made._saved, made._cost = 60.0, 3.0
    for now[0] in (61.0, 120.0, 209.0, 210.0):
        found.append((made.due(False), made.due(True)))

    late, early, never = (True, True), (False, True), (False, False)
    assert [early, early, late, never, never, never, late] == found


# Signals --------------------------------------------------------------------------------------------------------------


def test_the_first_signal_is_noted_a_second_interrupt_is_one_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stopping() as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert number == stop.signal
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_in_another_thread_signals_stay_as_they_are() -> None:
    found = []

    def enter() -> None:
        with stopping() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()

    assert [(0, signal.getsignal(signal.SIGTERM))] == found


# Passes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_pass_goes_on_and_ends_with_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"{METHODS[name]}, {OPTIONS}, keep=best}}"
    whole, (expected,) = trained(text, None, eval=task()[:2])
    with monkeypatch.context() as patch:
        interrupt(patch, 8, signal.SIGTERM)
        with pytest.raises(TerminatedError, match=f"after step 9 of {STEPS}; its state is kept in"):
            trained(text, tmp_path, eval=task()[:2])
    assert ["step-9"] == os.listdir(tmp_path / f"{name}-0")
    again, (found,) = trained(text, tmp_path, eval=task()[:2])

    assert whole.dump(hashes=True) == again.dump(hashes=True)
    assert expected.data == found.data
    assert [f"step-{STEPS}"] == os.listdir(tmp_path / f"{name}-0")


def test_an_interrupt_stays_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 3, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trained(f"{METHODS['admm']}, {OPTIONS}}}", tmp_path)

    assert ["step-4"] == os.listdir(tmp_path / "admm-0")


def test_a_signal_ends_with_the_code_that_shells_give_it() -> None:
    assert 143 == TerminatedError.exit_code


def test_a_finished_pass_is_not_trained_again_and_a_second_one_has_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"fixed-mask{{epochs=2, {OPTIONS}}} | fixed-mask{{epochs=3, lr=0.02}}"
    whole, expected = trained(text, None)
    steps: list[int] = []
    plain = Loop._step
    monkeypatch.setattr(Loop, "_step", lambda self, batches: (steps.append(self.step), plain(self, batches))[1])
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGTERM, steps=18)
        with pytest.raises(TerminatedError, match="after step 6 of 18"):
            trained(text, tmp_path)
    assert [*range(STEPS), *range(6)] == steps
    steps.clear()
    again, found = trained(text, tmp_path)

    assert list(range(6, 18)) == steps
    assert {"fixed-mask-0", "fixed-mask-1"} == set(os.listdir(tmp_path))
    assert whole.dump(hashes=True) == again.dump(hashes=True)
    assert [report.data for report in expected] == [report.data for report in found]


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    trained(f"{METHODS['admm']}, {OPTIONS}}}", tmp_path)

    for text, resources, message in [
        (f"{METHODS['admm']}, {OPTIONS}, epochs=3}}".replace("epochs=2, ", ""), {}, "has settings"),
        (f"{METHODS['admm']}, {OPTIONS}}}".replace("2:4", "1:4"), {}, "has patterns"),
        (f"{METHODS['admm']}, {OPTIONS}}}", {"train": task(32)}, "has data"),
        (f"{METHODS['admm']}, {OPTIONS}}}", {"eval": task(32)}, "was judged with keep None; this is last"),
    ]:
        with pytest.raises(UsageError, match=message):
            trained(text, tmp_path, **resources)


def test_without_a_folder_signals_and_disk_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []
    before = signal.getsignal(signal.SIGTERM)
    plain = Engine.pre_step
    monkeypatch.setattr(
        Engine, "pre_step", lambda self: (handlers.append(signal.getsignal(signal.SIGTERM)), plain(self))[1]
    )
    trained(f"{METHODS['admm']}, {OPTIONS}}}", None)

    assert [before] * STEPS == handlers


# What is no number ----------------------------------------------------------------------------------------------------


def bad_at(step: int) -> list[dict[str, Tensor]]:
    """Batches of which the one in this step of the first epoch, from 0, has a NaN."""
    batches = task()
    order = loop(METHOD).batches.epoch(3, 0)
    for batch in batches:
        for row in range(len(batch["x"])):
            if any(torch.equal(batch["x"][row], other) for other in order[step]["x"][:1]):
                batch["x"][row] = float("nan")
    return batches


METHOD = Method(Cubic(0.0, 0.6, 2), Hard())


def test_a_loss_that_is_no_number_leaves_the_state_before_it(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, seconds=1e9)
    made = Session(loop(METHOD, batches=bad_at(3)), checkpoints=kept)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4 of 12; .*the last good state is kept in .*-3"):
        made.run()

    assert ["step-3"] == os.listdir(tmp_path)
    tensors, plain = kept.load() or ({}, {})
    assert 3 == len(plain["losses"])
    good = loop(METHOD)
    good.run(3)
    assert all(torch.equal(value, tensors[f"model:{name}"]) for name, value in good.tensors().items())


def test_weights_that_are_no_numbers_do_not_replace_a_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Session(loop(METHOD), checkpoints=Checkpoints(tmp_path, seconds=0))
    plain = made.loop.engine.post_step

    def post_step(optimizer: torch.optim.Optimizer | None = None) -> None:
        plain(optimizer)
        if made.loop.engine.clock.step == 3:
            with torch.no_grad():
                made.loop.parameters[-1].fill_(float("inf"))

    monkeypatch.setattr(made.loop.engine, "post_step", post_step)
    monkeypatch.setattr(Checkpoints, "due", lambda self, epoch_ended: True)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 4 of 12; .* kept in .*step-2"):
        made.run()

    assert ["step-2"] == os.listdir(tmp_path)


def test_a_gradient_that_is_no_number_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loop(METHOD)
    before = {name: value.clone() for name, value in made.tensors().items()}
    made.parameters[0].register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) at step 1 of 12"):
        made.run()
    assert all(torch.equal(value, before[name]) for name, value in made.tensors().items())


def test_the_json_of_a_state_is_plain(kept: Checkpoints) -> None:
    made = loop(METHOD)
    made.run(2)
    kept.save(made.state_dict(), 2)
    words = json.loads((kept.folder / "step-2" / PLAIN).read_text())

    assert {"tensors", "plain", "state"} == words.keys()
    assert made.losses == json.loads(words["state"])["losses"]
