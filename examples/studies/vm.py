"""Whether the V and M that choose-vm picks for MiniLM are the best of those of about one predicted speed, untrained.

Rule of the paper ("Beyond 2:4"): for each V the smallest M that is fast enough, and of these the most diverse masks.
"""

from __future__ import annotations

from dataclasses import replace

from examples.studies import distilled
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Program
from sparsec.recipe import make_backend

BUDGET = "speedup=1.5, tokens=512"
CHOSEN = {"the paper's rule": "mode=paper", "ours, one pattern": "uniform=true", "ours": "mode=ours"}
GRID = ("16:2:10", "64:2:10", *(f"{v}:2:11" for v in (16, 32, 64, 128)), "16:2:12", "64:2:12")


def start(seed: int, place: Place) -> Start:
    """As the study `distilled`, and the backend that predicts speed; `density` is the share of weights that stay."""
    made = distilled.start(seed, place)
    names = [site.name for site in made.program.sites if site.eligible]

    def judge(program: Program) -> dict[str, float]:
        weights = [program.sites[name].read(program.module) for name in names]
        density = sum(int(one.count_nonzero()) for one in weights) / sum(one.numel() for one in weights)
        return {**made.judge(program), "density": density}

    return replace(made, resources={**made.resources, "backend": make_backend("kernel")}, judge=judge)


ARMS = [Arm(name, f"choose-vm{{{BUDGET}, {option}}} | oneshot") for name, option in CHOSEN.items()]
ARMS += [Arm("oneshot", "oneshot", pattern) for pattern in GRID]
STUDY = Study("vm", ARMS, start, ("embedding", "density"), page="accuracy.md", on_cpu="predicts speed on the CPU")
