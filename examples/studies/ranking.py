"""MiniLM on SST-2, unstructured: what gradients choose against magnitude, and mask training's path against none."""

from __future__ import annotations

from examples.studies.sst2 import STEPS, start
from examples.studies.study import Arm, Study

LR, SCORE_LR = "2e-4", "1e-3"
"""Of the rates tried in `ranking_grid`, the most accurate."""
CALMER = "3e-4"
"""A rate of scores that was added when two of six trainings had collapsed at the first."""
METHODS = ("fixed-mask", "seven-pre", "seven-dyn", "gradual", "platon")


def weights(lr: str) -> dict[str, str]:
    """What trains weights: names and passes."""
    return {name: f"{name}{{{STEPS}, lr={lr}}}" for name in METHODS}


def masks(rate: str) -> dict[str, str]:
    """What trains masks alone."""
    given = {"fixed": "start_density=0", "gradual": "start_density=0.3"}
    return {
        f"mask-training, {name}, {rate}": f"mask-training{{{STEPS}, score_lr={rate}, {option}}}"
        for name, option in given.items()
    }


UNTRAINED = {"mask": "mask | freeze"}
ARMS = [
    Arm(*arm, pattern, seed)
    for seed in (0, 1, 2)
    for pattern, arms in {
        "unstructured:0.6": UNTRAINED | weights(LR),
        "unstructured:0.7": UNTRAINED | weights(LR),
        "unstructured:0.8": UNTRAINED | weights(LR),
        "unstructured:0.9": UNTRAINED | masks(SCORE_LR) | masks(CALMER),
    }.items()
    for arm in arms.items()
]
STUDY = Study("ranking", ARMS, start, ("accuracy",))
