"""The rates of the study `ranking`, chosen on sentences of train.tsv that no training sees, with a seed of its own."""

from __future__ import annotations

from functools import partial

from examples.studies.ranking import masks, weights
from examples.studies.sst2 import start
from examples.studies.study import Arm, Study

SEED = 100
SCORE_RATES = ("3e-4", "1e-3", "3e-3", "1e-2")
TRIED = {"unstructured:0.8": [weights(lr)["fixed-mask"] for lr in ("3e-5", "1e-4", "2e-4")]}
TRIED["unstructured:0.9"] = [masks(rate)[f"mask-training, gradual, {rate}"] for rate in SCORE_RATES]
ARMS = [Arm(passes, passes, pattern, SEED) for pattern, tried in TRIED.items() for passes in tried]
STUDY = Study("ranking_grid", ARMS, partial(start, held_out=True), ("accuracy", "loss"))
