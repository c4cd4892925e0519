"""Resident memory over time of the runs that the memory gate compares."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from oneshot.cases import Case, Outcome
from oneshot.materials import one_block

MODEL = "llama"


def draw(found: Mapping[Case, Outcome], path: Path) -> bool:
    """One panel a calibration size; time is a share of each run, whose seconds stand in the legend. False: no runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = {c: o for c, o in found.items() if (c.model, c.method) == (MODEL, "sparsegpt") and o.runs}
    sizes = list(dict.fromkeys(case.size for case in chosen))
    if not sizes:
        return False
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(6 * len(sizes), 4), squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for case, outcome in chosen.items():
            if case.size == size:
                run = outcome.fastest
                shares = [at / run.series[-1][0] for at, _ in run.series]
                label = f"{case.tool}: {run.seconds:.0f} s CPU"
                axis.plot(shares, [above / 1e6 for _, above in run.series], label=label)
        bound = one_block(MODEL, *size) / 1e6
        axis.axhline(bound, color="grey", linestyle=":", label="one block, its Gram matrices, two buffers")
        axis.set(
            title=f"SparseGPT 2:4, {MODEL}, {size[0]}x{size[1]} tokens",
            xlabel="share of the run",
            ylabel="resident MB above the start",
        )
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True
