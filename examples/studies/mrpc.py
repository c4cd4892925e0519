"""MiniLM on MRPC: are two sentences paraphrases? Dense, and the arms of `sst2` at 2:4 and 64:2:5."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor

from examples.studies import minilm, sst2
from examples.studies.minilm import Row
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Program
from sparsec.training.loop import Settings
from sparsec.training.losses import CrossEntropy

DENSE = Settings(epochs=3, lr=2e-4, warmup=0.1)
SHORT, ARM_ROWS, CALIBRATED = 48, 480, 128  # sparse arms are not trained on rows with more tokens
JUDGED = 1000  # of the 1725 rows of the test file, for all seeds the same


def rows(data: Path, name: str) -> list[Row]:
    """Pairs and labels of one of the set's files; 1: they are paraphrases."""
    table = minilm.columns(data / "mrpc" / f"msr_paraphrase_{name}.txt", "#1 String", "#2 String", "Quality")
    return [Row((first, second), int(label)) for first, second, label in table]


def f1(logits: Tensor, labels: Tensor) -> float:
    """Of the class 1."""
    found, there = logits.argmax(1) == 1, labels == 1
    return 2 * int((found & there).sum()) / max(int(found.sum()) + int(there.sum()), 1)


def start(seed: int, place: Place) -> Start:
    """Fine-tune MiniLM on the training file, or take what an earlier run kept; judge on a part of the test file.

    The sparse arms are trained on some of the short rows that the dense model has seen.
    """
    mixed = rows(place.data, "train")
    random.Random(seed).shuffle(mixed)
    short = minilm.fitting(mixed, SHORT)
    judged_on = minilm.batches(random.Random(0).sample(rows(place.data, "test"), JUDGED), 64, place.device)
    train = minilm.batches(short[:ARM_ROWS], 64, place.device)
    calibration = minilm.calibration(minilm.batches(short[:CALIBRATED], 16, place.device))

    def judge(program: Program) -> dict[str, float]:
        logits, labels = minilm.answers(program, judged_on)
        return minilm.metrics(logits, labels) | {"F1": f1(logits, labels)}

    kept, seen = place.work / f"mrpc-{seed}.safetensors", minilm.batches(mixed, 64, place.device)
    program = minilm.dense(kept, seed, seen, DENSE, CrossEntropy(), place.device)
    return Start(program, {"train": train, "calibration": calibration, "teacher": program}, judge)


EVERY = 10
"""Steps between dual updates of admm: there are half as many steps as in `sst2`, whose other settings these are."""
ARMS = [Arm("dense", "", seed=seed) for seed in (0, 1, 2)]
ARMS += [
    Arm(*arm, pattern, seed)
    for seed in (0, 1, 2)
    for pattern, own in sst2.CHOSEN.items()
    for arm in sst2.sparse(own, EVERY).items()
]
STUDY = Study("mrpc", ARMS, start, ("accuracy", "F1"), "fixed-mask", page="accuracy.md")
