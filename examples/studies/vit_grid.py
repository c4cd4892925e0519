"""The rates of the study `vit`, chosen with seed 0 on the test pictures that the study does not judge on."""

from __future__ import annotations

from functools import partial

from examples.studies.study import Arm, Study
from examples.studies.vit import RATES, start, trained

TRIED = [trained(name, lr) for name in RATES for lr in ("3e-4", "1e-3")]
ARMS = [Arm(passes, passes, "64:2:5", 0) for passes in TRIED]
STUDY = Study("vit_grid", ARMS, partial(start, held_out=True), ("accuracy", "loss"), page="accuracy.md", keep=True)
