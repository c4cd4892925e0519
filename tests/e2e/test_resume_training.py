"""A compile that trains and is killed, told to end or interrupted goes on where it was and ends bit-identical."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from training_models import Wide, task

import sparsec
from sparsec.errors import UsageError
from sparsec.training.checkpoints import TerminatedError
from sparsec.training.engine import Engine

PER_EPOCH, KILLED_IN = 4, 6  # steps: the checkpoint of the first epoch is there, the second epoch is half done

STOPPING = """
import os, signal, sys
from sparsec.training.engine import Engine

pre_step, steps = Engine.pre_step, []

def counted(self):
    steps.append(self.clock.step + 1)
    if steps[-1] == {at}:
        os.kill(os.getpid(), {number})
    pre_step(self)

Engine.pre_step = counted
sys.argv = ["sparsec", "compile", *{arguments!r}]
from sparsec.cli import main
try:
    main()
finally:
    print("steps", *steps, file=sys.stderr)
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small BERT with a head, with labelled token ids to train on and to judge by."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("data")
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 70}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=40, **sizes))
    model.save_pretrained(folder / "model")
    rows = torch.randint(0, 50, (32, 8)).tolist()
    lines = [json.dumps({"input_ids": row, "label": int(row[0] > 24)}) + "\n" for row in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    named = ["--train", str(folder / "train.jsonl"), "--eval", str(folder / "train.jsonl")]
    method = ["--method", "admm{every=2, keep=best, log_every=1}", "--epochs", "3", "--batch-size", "8", "--lr", "1e-3"]
    return [str(folder / "model"), "--pattern", "2:4", *named, *method, "--backend", "hf"]


def compiled(arguments: list[str], cwd: Path, at: int = 0, number: int = 0) -> subprocess.CompletedProcess[str]:
    code = STOPPING.format(arguments=arguments, at=at, number=int(number))
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = compiled([*arguments, "-o", "x", "--log", "x.log"], folder)
    assert 0 == done.returncode, done.stderr
    return folder / "x"


def check_same(whole: Path, again: Path) -> None:
    """The same weights and graph, and the same story of the training."""
    files = [path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".safetensors", ".json")]
    compared = [path for path in files if path.name != "manifest.json"]
    assert compared
    for path in compared:
        assert (whole / path).read_bytes() == (again / path).read_bytes(), path
    first, second = (json.loads((folder / "manifest.json").read_text())["passes"][0] for folder in (whole, again))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_a_compile_that_was_told_to_end_goes_on_with_the_same_recipe_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with a real signal."""
    pre_step = Engine.pre_step

    def told(self: Engine) -> None:
        if self.clock.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        pre_step(self)

    def compile(name: str, resume: bool = False, seed: int = 0) -> None:
        options = sparsec.Options(measure_speed=False, resume=resume)
        sparsec.compile(
            models.made(Wide), (models.random(2, 12),), out=tmp_path / name, pattern="2:4", seed=seed,
            passes="sr-ste{epochs=2, every=2, lr=0.01}", resources={"train": task(), "log": tmp_path / f"{name}.log"},
            options=options,
        )  # fmt: skip

    compile("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "pre_step", told)
        with pytest.raises(TerminatedError, match=r"told to end after step 8 of 12.*--resume goes on from there"):
            compile("x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(UsageError, match=r"recipe\.seed was 0, is now 1"):
        compile("x", resume=True, seed=1)
    compile("x", resume=True)

    check_same(tmp_path / "whole", tmp_path / "x")
    assert {"whole", "x", "whole.log", "x.log"} == set(os.listdir(tmp_path))
    assert steps_of(tmp_path / "whole.log") == steps_of(tmp_path / "x.log") == [10, 12]


def steps_of(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def timeless(log: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said", "gone_on_from"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "", PER_EPOCH),
        (signal.SIGTERM, 143, "the process was told to end after step 6 of 12", KILLED_IN),
        (signal.SIGINT, 130, "finished work is kept in", KILLED_IN),
    ],
)
def test_a_stopped_training_is_resumed_and_ends_bit_identical(
    arguments: list[str], whole: Path, tmp_path: Path, number: int, code: int, said: str, gone_on_from: int
) -> None:
    stopped = compiled([*arguments, "-o", "x", "--log", "x.log"], tmp_path, KILLED_IN, number)
    assert code == stopped.returncode, stopped.stderr
    assert said in stopped.stderr
    assert [".x.work", "x.log"] == sorted(os.listdir(tmp_path))
    assert [f"step-{gone_on_from}"] == os.listdir(tmp_path / ".x.work" / "admm-0")
    resumed = compiled([*arguments, "-o", "x", "--log", "x.log", "--resume"], tmp_path)

    assert 0 == resumed.returncode, resumed.stderr
    assert f"steps {' '.join(map(str, range(gone_on_from + 1, 13)))}\n" in resumed.stderr
    assert ["x", "x.log"] == sorted(os.listdir(tmp_path))
    check_same(whole, tmp_path / "x")
    assert sorted([*range(1, 13), 4, 8, 12]) == steps_of(tmp_path / "x.log")  # and what was judged
    assert timeless(whole.with_name("x.log")) == timeless(tmp_path / "x.log")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_torchrun_compiles_with_two_processes_of_which_one_writes(arguments: list[str], tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sparsec.cli"]
    command = [*run, "compile", *arguments, "--json", "-o", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)

    assert 0 == done.returncode, done.stderr
    told = json.loads(done.stdout)  # one process speaks
    assert ["x"] == os.listdir(tmp_path)
    assert (2, 6) == tuple(told["passes"][0][key] for key in ("processes", "steps"))  # 32 rows, 2 x 8 a step
