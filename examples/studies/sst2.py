"""MiniLM on SST-2: dense, pruned in one shot, and trained under 2:4 and 64:2:5 with an equal budget of steps."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from examples.studies import minilm
from examples.studies.minilm import Batches, Row
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Program
from sparsec.training.loop import Settings
from sparsec.training.losses import CrossEntropy

DENSE = Settings(epochs=1, lr=2e-4, warmup=0.1)
DENSE_ROWS, ARM_ROWS, CALIBRATED = 6000, 900, 256
HELD_OUT, WORDS = 4000, 12  # of the last rows of train.tsv, as mixed, those that are as long as a sentence


def rows(data: Path, name: str) -> list[tuple[str, int]]:
    """Sentences and labels of one of the set's files."""
    lines = (data / "sst2" / f"{name}.tsv").read_text().splitlines()[1:]
    return [(text.strip(), int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def batches(some: Sequence[tuple[str, int]], size: int, device: str) -> Batches:
    return minilm.batches([Row((text,), label) for text, label in some], size, device)


def start(seed: int, place: Place, held_out: bool = False) -> Start:
    """Fine-tune MiniLM on a part of train.tsv, or take what an earlier run kept; judge on dev and test, or held out.

    The sparse arms are trained on a part of what the dense model has seen.
    """
    mixed = rows(place.data, "train")
    random.Random(seed).shuffle(mixed)
    judged = [row for row in mixed[-HELD_OUT:] if len(row[0].split()) >= WORDS]
    if not held_out:
        judged = rows(place.data, "dev") + rows(place.data, "test-labeled")
    judged_on = batches(judged, 64, place.device)
    train = batches(mixed[:ARM_ROWS], 64, place.device)
    calibration = minilm.calibration(batches(mixed[:CALIBRATED], 16, place.device))

    def judge(program: Program) -> dict[str, float]:
        return minilm.metrics(*minilm.answers(program, judged_on))

    kept, seen = place.work / f"sst2-{seed}.safetensors", batches(mixed[:DENSE_ROWS], 64, place.device)
    program = minilm.dense(kept, seed, seen, DENSE, CrossEntropy(), place.device)
    return Start(program, {"train": train, "calibration": calibration, "teacher": program}, judge)


STEPS = "epochs=2, batch_size=8"
CHOSEN = {
    "2:4": {"fixed-mask": "lr=3e-5", "sr-ste": "lr=3e-5", "admm": "lr=3e-5, rho=1e-2"},
    "64:2:5": {"fixed-mask": "lr=2e-4", "sr-ste": "lr=2e-4", "admm": "lr=2e-4, rho=1e-2"},
}
"""Of each method, what was most accurate in `sst2_grid`."""


def sparse(own: Mapping[str, str], every: int = 25, steps: str = STEPS, frozen: int = 1) -> dict[str, str]:
    """The arms of a pattern, at the settings of its trainings: names and passes."""
    trained = {
        "fixed-mask": f"fixed-mask{{{steps}, {own['fixed-mask']}",
        "sr-ste": f"sr-ste{{{steps}, {own['sr-ste']}, frozen_epochs={frozen}",
        "admm": f"admm{{{steps}, {own['admm']}, every={every}, frozen_epochs={frozen}",
    }
    taught = {f"{name}, KD": f"{trained[name]}, distill=1" for name in ("fixed-mask", "admm")}
    return {"mask": "mask | freeze", "oneshot": "oneshot"} | {k: f"{v}}}" for k, v in (trained | taught).items()}


ARMS = [Arm("dense", "", seed=seed) for seed in (0, 1, 2)]
ARMS += [
    Arm(*arm, pattern, seed) for seed in (0, 1, 2) for pattern in CHOSEN for arm in sparse(CHOSEN[pattern]).items()
]
STUDY = Study("sst2", ARMS, start, ("accuracy",), "fixed-mask")
