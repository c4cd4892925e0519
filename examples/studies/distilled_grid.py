"""The rate of the study `distilled`, with a seed of its own; judged on sentences of WikiSplit that no training sees."""

from __future__ import annotations

from functools import partial

from examples.studies.distilled import start, training
from examples.studies.study import Arm, Study

SEED, RATES = 100, ("1e-4", "3e-4", "1e-3")
ARMS = [Arm("oneshot", "oneshot", "64:2:5", SEED)]
ARMS += [Arm(passes, f"oneshot | {passes}", "64:2:5", SEED) for passes in map(training, RATES)]
STUDY = Study(
    "distilled_grid", ARMS, partial(start, held_out=True), ("embedding", "vector"), page="accuracy.md", keep=True
)
