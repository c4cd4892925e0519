"""Every method whose masks follow scores, under every pattern it is defined for: exact, compiled, and resumable."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import models
import pytest
import torch
from training_models import FAST, Wide, check, context, run, task, wide

import sparsec
from sparsec.pipeline import Context, PassManager
from sparsec.program import Program
from sparsec.training.engine import Engine

METHODS = {
    "seven-pre": "seven-pre{epochs=2, scope=local, score_batches=7",
    "seven-dyn": "seven-dyn{epochs=2, scope=local, every=2, end=0.6",
    "platon": "platon{epochs=2, scope=local, every=2",
    "movement": "movement{epochs=2, every=2",
    "s-ste": "s-ste{epochs=2",
    "gumbel-mask": "gumbel-mask{epochs=2, gate_lr=0.01",
    "mask-training": "mask-training{epochs=2, score_lr=0.01, rest=trained",
    "imp": "imp{epochs=2, step=0.25, every=0.2, rewind=initial",
    "dcil": "dcil{epochs=2, every=2",
    "three-stage-lora": "three-stage-lora{epochs=2, rank=3, adapter_lr=0.02, stage1=0.17, stage2=0.34, every=2",
}
PATTERNS = ["2:4", "16:2:8", "unstructured:0.75"]
DEFINED = [(name, pattern) for name in METHODS for pattern in PATTERNS if name != "gumbel-mask" or pattern == "2:4"]


def grid(*every_day: tuple[str, str]) -> pytest.MarkDecorator:
    """All that is defined; by default these, the rest in `make test-all`."""
    return pytest.mark.parametrize(
        ("name", "pattern"),
        [
            pytest.param(*case, id="-".join(case), marks=() if case in every_day else pytest.mark.slow)
            for case in DEFINED
        ],
    )


@grid(("movement", "16:2:8"))
def test_every_method_ends_in_every_pattern_and_as_an_artifact(name: str, pattern: str, tmp_path: Path) -> None:
    passes = f"{METHODS[name]}, {FAST}}}"
    done, _ = run(passes, wide({"*": pattern}))
    check(done, pattern)

    artifact = sparsec.compile(
        models.made(Wide),
        (models.random(2, 12),),
        out=tmp_path / "made",
        pattern=pattern,
        passes=passes,
        resources={"train": task()},
        options=sparsec.Options(measure_speed=False),
    )
    x = models.random(2, 12)
    with torch.no_grad():
        expected, found = done(x)["logits"], artifact.load()(x=x)["logits"]
    assert torch.allclose(expected, found, rtol=0, atol=1e-5 * float(expected.abs().max()))


@grid(("gumbel-mask", "2:4"))
def test_a_training_that_was_stopped_goes_on_bit_for_bit(
    name: str, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once while masks move, once where most methods have final ones."""
    text, step = f"{METHODS[name]}, {FAST}}}", Engine.pre_step
    whole = trained(text, pattern, None)
    for at in (3, 9):
        with monkeypatch.context() as patch:

            def pre_step(self: Engine, at: int = at) -> None:
                if self.clock.step == at:
                    os.kill(os.getpid(), signal.SIGINT)
                step(self)

            patch.setattr(Engine, "pre_step", pre_step)
            with pytest.raises(KeyboardInterrupt):
                trained(text, pattern, tmp_path)
    assert [f"step-{at + 1}"] == os.listdir(tmp_path / f"{name}-0")

    assert whole.dump(hashes=True) == trained(text, pattern, tmp_path).dump(hashes=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_the_task(name: str) -> None:
    text = METHODS[name].replace("epochs=2", "epochs=8")
    _, report = run(f"{text}, lr=0.02}}", wide({"*": "2:4"}))
    losses = [value for _, value in report.data["curves"]["loss"]]

    assert sum(losses[-6:]) < 0.75 * sum(losses[:6])


def trained(text: str, pattern: str, folder: Path | None) -> Program:
    ctx = Context(resources=context().resources, workdir=folder)
    return PassManager.parse(text).run(wide({"*": pattern}), ctx)
