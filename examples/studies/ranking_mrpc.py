"""MiniLM on MRPC, unstructured: what gradients choose against magnitude."""

from __future__ import annotations

from examples.studies.mrpc import start
from examples.studies.sst2 import STEPS
from examples.studies.study import Arm, Study

LR = "2e-4"
"""As in `ranking`."""
METHODS = ("fixed-mask", "seven-pre", "seven-dyn", "platon")
ARMS = [Arm("dense", "", seed=seed) for seed in (0, 1, 2)]
ARMS += [
    Arm(name, f"{name}{{{STEPS}, lr={LR}}}", f"unstructured:{sparsity}", seed)
    for seed in (0, 1, 2)
    for sparsity in ("0.6", "0.7", "0.8")
    for name in METHODS
]
STUDY = Study("ranking_mrpc", ARMS, start, ("accuracy", "F1"), "fixed-mask", page="accuracy.md")
