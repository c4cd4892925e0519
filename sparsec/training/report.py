"""What a training pass tells about itself: plain data that goes into the manifest."""

from __future__ import annotations

import math
from typing import Any

from sparsec.training.evaluation import Evaluator
from sparsec.training.loop import Loop

_POINTS = 200  # of a curve


def report(loop: Loop, evaluator: Evaluator | None) -> dict[str, Any]:
    """Curves, how many weights are zero, what was trained on and, where it was judged, the figures of every epoch."""
    losses = [[i + 1.0, value] for i, value in enumerate(loop.losses)]
    curves = {name: _thin(curve) for name, curve in {"loss": losses, **loop.engine.curves}.items()}
    sites = loop.engine.sites
    zeros = sum(int((one.parameter == 0).sum()) for one in sites)
    total = sum(one.parameter.numel() for one in sites)
    made = {
        "trained": len(sites),
        "zeros": zeros / max(total, 1),
        "violations": 0,  # `Engine.end` raises otherwise
        "steps": loop.steps,
        "curves": curves,
        "data": {"sha256": loop.batches.sha256, "samples": loop.batches.samples},
    }
    if loop.group.world > 1:
        made["processes"] = loop.group.world
    if evaluator:
        made["evaluation"] = evaluator.found
        if evaluator.keep == "best":
            made["kept_step"] = evaluator.found[evaluator.best]["step"]
    return made


def _thin(curve: list[list[float]]) -> list[list[float]]:
    """At most `_POINTS` points, each the mean of a run of equal length."""
    size = math.ceil(len(curve) / _POINTS) or 1
    parts = [curve[i : i + size] for i in range(0, len(curve), size)]
    return [[part[-1][0], sum(value for _, value in part) / len(part)] for part in parts]
