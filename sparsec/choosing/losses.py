"""What each pattern would lose on each site, by objective. The losses of sites add up to that of the model.

retained: -log of the share of the summed magnitude that is kept, times the site's share of the model's magnitude: a
    model's score is the geometric mean of its sites', and a site that keeps next to nothing ruins it.
reconstruction: the squared relative output error of the site, divided by the number of sites (see `reconstruction`).
sensitivity: the share of the model's gradient score |w g| that is dropped. So a tensor's sensitivity, the sum of its
    scores, ranks it against the others, and the budget trims the least sensitive first. This is in the style of
    Sensi-BERT (arXiv 2307.11764), which ranks the parameters of each tensor by sensitivity and trims a model to a
    budget before fine-tuning. Only its abstract was at hand: whether its sensitivity is this first-order score, how it
    smooths scores over steps, and how ties of tensors are broken could not be established.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from sparsec.choosing import reconstruction
from sparsec.choosing.options import Objective
from sparsec.choosing.scoring import retained
from sparsec.oneshot import gradients
from sparsec.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.pipeline import Progress
    from sparsec.program import Program
    from sparsec.sites import Site

Batches = Callable[[], Sequence[dict[str, "Tensor"]]]
"""Calibration data, asked for where an objective needs it. Raises UsageError where there is none."""
Losses = dict[str, dict[str, float]]
"""By site and pattern text. A site that cannot be judged, because no sample reaches it, is not there."""


def losses(
    program: Program,
    wanted: Mapping[str, Sequence[str]],
    objective: Objective,
    batches: Batches,
    seed: int,
    progress: Progress,
) -> Losses:
    """The losses of the wanted patterns of each site. Reads the program only."""
    sites = [site for site in program.sites if site.name in wanted]
    if objective == "reconstruction":
        found = reconstruction.errors(program, wanted, batches(), progress)
        return {name: {text: one / len(sites) for text, one in each.items()} for name, each in found.items()}
    if objective == "sensitivity":
        scores = gradients.gather(program, sites, batches(), "taylor", seed, progress)
        return _shares(sites, wanted, scores.__getitem__, lambda kept: 1 - kept, progress)
    magnitudes = {site.name: site for site in sites}
    return _shares(
        sites,
        wanted,
        lambda name: magnitudes[name].read(program.module).float().abs(),
        lambda kept: -math.log(max(kept, 1e-6)),
        progress,
    )


def _shares(
    sites: Sequence[Site],
    wanted: Mapping[str, Iterable[str]],
    score_of: Callable[[str], Tensor],
    loss_of: Callable[[float], float],
    progress: Progress,
) -> Losses:
    """Losses from the share of a score that is kept, weighted by the site's share of the whole score."""
    import torch

    found: Losses = {}
    totals: dict[str, float] = {}
    for done, site in enumerate(sites):
        progress("scoring", done, len(sites))
        score = score_of(site.name)
        totals[site.name] = float(score.sum(dtype=torch.float64))
        found[site.name] = {text: loss_of(retained(Pattern.parse(text), score)) for text in wanted[site.name]}
    whole = sum(totals.values()) or 1.0
    return {name: {text: one * totals[name] / whole for text, one in each.items()} for name, each in found.items()}
