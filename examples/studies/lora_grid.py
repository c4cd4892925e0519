"""The rates of the study `lora`, with a seed of its own; judged on the calibration lines that it does not draw."""

from __future__ import annotations

from functools import partial

from examples.studies.lora import ON_CPU, lora, start
from examples.studies.study import Arm, Study

SEED = 100
SETTINGS = (("3e-4", 16), ("1e-3", 16), ("3e-3", 16), ("1e-2", 16), ("1e-3", 64), ("3e-3", 64))
TRIED = [lora(*setting, more) for more in ("", ", distill=1") for setting in SETTINGS]
ARMS = [Arm(passes, passes, "64:2:5", SEED) for passes in TRIED]
STUDY = Study("lora_grid", ARMS, partial(start, held_out=True), ("NLL",), on_cpu=ON_CPU)
