"""Scores of all sites at once, of the dense model: what a permutation shall help to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from sparsec.errors import PatternError
from sparsec.oneshot.moments import Collector
from sparsec.oneshot.operands import matrices
from sparsec.oneshot.scores import SCORES, Facts
from sparsec.oneshot.stops import find_stops
from sparsec.oneshot.stream import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.sites import Site

Score = Literal["magnitude", "wanda", "ria"]


def scores_of(
    program: Program, sites: Sequence[Site], score: Score, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """(batch, rows, cols) of each site, finite, not negative. `batches` are looked at where the score needs inputs.

    A matrix that no sample reaches is scored by magnitude. Raises PatternError where a weight is not finite.
    """
    import torch

    for site in sites:
        if not bool(torch.isfinite(site.read(program.module).sum(dtype=torch.float32))):
            raise PatternError(f"{site.name}: the weight holds NaN or Inf; repair the checkpoint before permuting it")
    if SCORES[score].needs == "nothing":
        return {site.name: site.read(program.module).float().abs() for site in sites}
    with torch.no_grad():
        collectors = _squares(program, sites, batches)
    found = {}
    for site in sites:
        scored = []
        for weight, collector in zip(site.read(program.module).float(), collectors[site.name], strict=True):
            moments = collector.finish(site.name)
            value = SCORES[score].function(weight, Facts(weight, moments))
            scored.append(value if bool(value.any()) else weight.abs())
        found[site.name] = torch.stack(scored)
    return found


def _squares(
    program: Program, sites: Sequence[Site], batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, list[Collector]]:
    """The mean square inputs of every matrix of every site, in one walk through the graph."""
    collectors = {site.name: [Collector(site.shape[2], "squares") for _ in range(site.shape[0])] for site in sites}
    uses = [
        (use, site) for stop in find_stops(program.module, sites) for site in stop.sites for use in stop.uses[site.name]
    ]
    place = {node: i for i, node in enumerate(program.module.graph.nodes)}
    stream = Stream(program.module, [[batch[name] for name in program.inputs] for batch in batches])
    for use, site in sorted(uses, key=lambda each: place[each[0].node]):
        stream.advance(use.node)
        for arguments, x in stream.at(use.node, use.source):
            for item, rows in matrices(use.node, site, arguments, x, list(use.items)):
                collectors[site.name][item].add(rows)
    return collectors
