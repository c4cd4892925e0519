"""MiniLM on GLUE at the size of a GPU: the arms of `sst2` at 2:4, 64:2:5 and 1:4, on whole sets and for more steps.

RTE, CoLA, STS-B (a score, not classes), MRPC and a part of SST-2, each a study of its own. A set is read from the
folder of data, or where it has none of that name from the hub; all are judged on what GLUE calls dev.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from examples.studies import minilm, mrpc, sst2
from examples.studies.minilm import Row
from examples.studies.study import Arm, MissingDataError, Place, Start, Study
from sparsec import Program
from sparsec.errors import UsageError
from sparsec.training.labelled import Split, read_labelled
from sparsec.training.losses import CrossEntropy, MeanSquare
from sparsec.training.metrics import evaluate

LENGTH, CALIBRATED, MOST = 128, 256, 20_000  # tokens of a row, at which it is cut; rows
FILES: dict[Split, str] = {"train": "train.tsv", "eval": "dev.tsv"}


@dataclass(frozen=True)
class Set:
    """One of GLUE's."""

    name: str
    """Of its folder, and on the hub."""
    metrics: tuple[str, ...]
    task: Literal["classification", "regression"] = "classification"
    columns: tuple[str, ...] = ()
    """Of text and, the last, of labels in its files, where their names do not say so."""


SETS = (
    Set("rte", ("accuracy",)),
    Set("cola", ("mcc",), columns=("3", "1")),  # no header
    Set("stsb", ("pearson", "spearman"), "regression"),
    Set("mrpc", ("accuracy", "f1")),
    Set("sst2", ("accuracy",)),
)


def rows(data: Path, of: Set, split: Split) -> list[Row]:
    """Texts and labels. Raises MissingDataError where neither the folder of data nor the hub has the set."""
    folder = data / of.name
    text, label = of.columns[:-1], "".join(of.columns[-1:])
    if folder.is_dir():
        source = str(folder / FILES[split])
        found = read_labelled(source, text_columns=text, label_column=label, task=of.task, split=split)
    else:
        try:
            found = read_labelled(f"glue/{of.name}", task=of.task, split=split)
        except UsageError as error:
            raise MissingDataError(f"data missing: there is no {folder}, and from the hub: {error}") from error
    assert found.labels is not None  # which both tasks have
    return [Row(tuple(texts), label) for (_, texts), label in zip(found.items, found.labels, strict=True)]


def start(of: Set, seed: int, place: Place) -> Start:
    """Fine-tune MiniLM on the set, or take what an earlier run kept; the sparse arms are trained on the same rows."""
    mixed, judged = rows(place.data, of, "train"), rows(place.data, of, "eval")
    random.Random(seed).shuffle(mixed)
    train = minilm.batches(mixed[:MOST], 64, place.device, LENGTH)
    calibration = minilm.calibration(minilm.batches(mixed[:CALIBRATED], 16, place.device, LENGTH))
    judged_on = minilm.batches(judged, 64, place.device, LENGTH)

    def judge(program: Program) -> dict[str, float]:
        return evaluate(program, judged_on, of.task)

    kept = place.work / f"glue_{of.name}-{seed}.safetensors"
    loss, outputs = (MeanSquare(), 1) if of.task == "regression" else (CrossEntropy(), 2)
    program = minilm.dense(kept, seed, train, mrpc.DENSE, loss, place.device, outputs)
    return Start(program, {"train": train, "calibration": calibration, "teacher": program}, judge)


STEPS, FROZEN = "epochs=4, batch_size=16", 2
SETTINGS = sst2.CHOSEN | {"1:4": sst2.CHOSEN["64:2:5"]}
"""Of `sst2`, chosen there and not here; 1:4, which was not tried there, has those of 64:2:5."""
SEEDS = (0, 1, 2)


def arms() -> Sequence[Arm]:
    """Of every set the same."""
    patterns = {pattern: sst2.sparse(own, steps=STEPS, frozen=FROZEN) for pattern, own in SETTINGS.items()}
    sparse = [Arm(*arm, pattern, seed) for seed in SEEDS for pattern, own in patterns.items() for arm in own.items()]
    return [Arm("dense", "", seed=seed) for seed in SEEDS] + sparse


STUDIES = [
    Study(f"glue_{of.name}", arms(), partial(start, of), of.metrics, "fixed-mask", page="accuracy.md") for of in SETS
]
