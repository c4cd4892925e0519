"""The settings of the study `sst2`, chosen on sentences of train.tsv that no training sees, with a seed of its own."""

from __future__ import annotations

from functools import partial

from examples.studies.sst2 import STEPS, start
from examples.studies.study import Arm, Study

SEED = 100
RATES = {"2:4": ("3e-5", "1e-4"), "64:2:5": ("1e-4", "2e-4")}


def tried(low: str, high: str) -> list[str]:
    """Pass text, two or three of each method."""
    pulls = ((low, "1e-2"), (high, "1e-2"), (high, "1e-1"))
    return [
        *(f"fixed-mask{{{STEPS}, lr={lr}}}" for lr in (low, high)),
        *(f"sr-ste{{{STEPS}, lr={lr}, frozen_epochs=1}}" for lr in (low, high)),
        *(f"admm{{{STEPS}, lr={lr}, rho={rho}, every=25, frozen_epochs=1}}" for lr, rho in pulls),
    ]


ARMS = [Arm("dense", "", seed=SEED)]
ARMS += [Arm(passes, passes, pattern, SEED) for pattern, rates in RATES.items() for passes in tried(*rates)]
BESIDES = (  # not among what was chosen from: three times the steps, and training that starts from one-shot pruning
    "fixed-mask{epochs=6, batch_size=8, lr=2e-4}",
    "admm{epochs=6, batch_size=8, lr=4e-4, rho=1e-1, every=25, frozen_epochs=2}",
    "admm{epochs=6, batch_size=8, lr=4e-4, rho=1e-1, every=100, frozen_epochs=2}",
    "oneshot",
    f"oneshot | fixed-mask{{{STEPS}, lr=3e-5}}",
    f"oneshot | fixed-mask{{{STEPS}, lr=3e-5, loss=none, distill=1, teacher=teacher}}",
)
ARMS += [Arm(passes, passes, "64:2:5", SEED) for passes in BESIDES]
STUDY = Study("sst2_grid", ARMS, partial(start, held_out=True), ("accuracy", "loss"))
