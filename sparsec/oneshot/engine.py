"""Walk once through the graph with all calibration samples, pruning every site before it is used.

1. Sites that read one value (q, k and v) share its moments. Each site sees the inputs that the pruned layers before it
   give, and is asked for what the dense model's layer gave there (`Calibration`, asymmetric): two streams side by side.
2. A site with several inputs (a layer called twice) is pruned before its first use, on the dense model's inputs.
3. Memory: one stop's Gram matrices, the values that cross it in each stream, and the new weights.
4. A solved site is written to the journal, if there is one, before the next is begun; what is found there is not solved
   again. Streams are deterministic, so a resumed run ends as an uninterrupted one does.
5. Where the dense model routes other tokens to an expert, their inputs do not match: its own are then taken.
6. Under torch.distributed every process is given all batches and runs its share; moments are added up.
7. Weights that lie in mapped files, the dense ones and those of the journal, are given back after their last use here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsec import _fx, mapping
from sparsec.errors import PatternError, UsageError
from sparsec.oneshot import gradients
from sparsec.oneshot.journal import Entry, Journal
from sparsec.oneshot.moments import Collector, Moments, nbytes
from sparsec.oneshot.operands import matrices
from sparsec.oneshot.scores import SCORES
from sparsec.oneshot.solving import Method, misfit
from sparsec.oneshot.stops import Stop, Use, bias_of, find_stops
from sparsec.oneshot.stream import Stream
from sparsec.oneshot.teams import is_plain, solve_team, teams_of

# Calibration tokens, weights of a site: above either, freed memory is given back around each stop's work.
_MANY_TOKENS, _LARGE_SITE = 4096, 1 << 20

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from sparsec.pipeline import Progress
    from sparsec.program import Program
    from sparsec.sites import Site


@dataclass
class Result:
    """What was done to each site: by name, what it is now, its reconstruction error, and what a user should know."""

    sites: dict[str, Site] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unreached: list[str] = field(default_factory=list)


def prune(
    program: Program,
    sites: Sequence[Site],
    batches: Sequence[dict[str, Tensor]],
    method: Method,
    seed: int,
    progress: Progress,
    journal: Journal | None = None,
) -> Result:
    """Prune the sites of a program in place (its module is edited); every site has a pattern and no mask yet.

    Raises SparsecError naming the site where inputs are not finite or a solver fails.
    """
    import torch

    for site in sites:
        if reason := misfit(site.pattern, method.solver):
            raise PatternError(f"{site.name}: {reason}")
        if not bool(torch.isfinite(site.read(program.module).sum(dtype=torch.float32))):
            raise PatternError(f"{site.name}: the weight holds NaN or Inf; repair the checkpoint before pruning it")
    result = Result()
    gathered: dict[str, Tensor] = {}
    if SCORES[method.score].needs == "gradients" and method.solver in ("none", "refit"):
        _one_process(method)
        gathered = gradients.gather(program, sites, batches, method.score, seed, progress)
    with torch.no_grad():
        if method.need is not None:
            _Walk(program, sites, batches, method, gathered, progress, journal, result).run()
            return result
        for done, site in enumerate(sites):  # nothing is to be known of inputs
            progress("pruning", done, len(sites))
            for each, entry in solve_team(program, (site,), method, {}, gathered):
                _put(program, each, entry, result)
    return result


def _one_process(method: Method) -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise UsageError(f"score {method.score} is gathered by one process; run it without torch.distributed")


@dataclass
class _Walk:
    program: Program
    sites: Sequence[Site]
    batches: Sequence[dict[str, Tensor]]
    method: Method
    gathered: dict[str, Tensor]
    progress: Progress
    journal: Journal | None
    result: Result
    much: bool = field(init=False)

    def run(self) -> None:
        module = self.program.module
        stops = find_stops(module, self.sites)
        given = [[batch[name] for name in self.program.inputs] for batch in _share(self.batches)]
        known = self._dense_moments([stop for stop in stops if stop.shared], module, given)
        stream = Stream(module, given)
        original: Stream | None = None
        two = self.method.need == "cross" or self.method.calibration == "independent"
        dense = self.program.clone().module if two else module
        tokens = sum(batch[0].numel() for batch in given)
        self.much = tokens > _MANY_TOKENS or any(math.prod(site.shape) > _LARGE_SITE for site in self.sites)
        passed: list[Tensor] = []
        for stop in stops:
            beside = _solver_bytes(stop, self.method)
            stream.advance(stop.node, beside)
            if two and original is None:
                original = stream.fork().on(dense)  # up to here the two are one
            if original is not None:
                original.advance(stop.node, beside)
            mapping.release(*passed)  # rule 7
            passed = [_fx.get_tensor(dense, site.name) for site in stop.sites]  # before they are pruned
            self._prune(stop, known, stream, original)
            if original is None:
                mapping.release(*passed)  # nobody reads the dense ones again
            passed += [_fx.get_tensor(module, site.name) for site in stop.sites]
            self._trim()
        self.progress("pruning", len(self.sites), len(self.sites))

    def _trim(self) -> None:
        """Give freed memory back, where there is much of it."""
        if self.much:
            mapping.trim()

    def _prune(self, stop: Stop, known: dict[str, dict[int, Moments]], stream: Stream, original: Stream | None) -> None:
        """The sites of a stop, all moments being forgotten at its end (rule 3)."""
        measured: dict[Any, dict[int, Moments]] = {}
        for team in teams_of(self.program.module, stop, self.method):
            self.progress("pruning", len(self.result.sites), len(self.sites))
            finished = [self.journal.read(site) if self.journal else None for site in team]
            if all(finished):
                for site, entry in zip(team, finished, strict=True):
                    _put(self.program, site, entry, self.result)  # type: ignore[arg-type]
                continue
            site = team[0]
            moments = known.get(site.name) or self._moments(site, stop.uses[site.name], stream, original, measured)
            if not any(one.tokens for one in moments.values()):
                self.result.unreached += [each.name for each in team]
                continue
            for each, entry in list(solve_team(self.program, team, self.method, moments, self.gathered)):
                kept = self.journal.keep(each, entry) if self.journal else entry
                _put(self.program, each, kept, self.result)

    def _moments(
        self, site: Site, uses: Sequence[Use], stream: Stream, original: Stream | None, measured: dict[Any, Any]
    ) -> dict[int, Moments]:
        """Moments by item; sites of one plain input share them through `measured`."""
        key = (uses[0].source, site.shape[2]) if is_plain(site) else site.name
        if key not in measured:
            collectors = self._collect(site, uses, stream, original)
            self._trim()
            measured[key] = {item: one.finish(site.name) for item, one in collectors.items()}
            self._trim()
        found: dict[int, Moments] = measured[key]
        return found

    def _collect(
        self, site: Site, uses: Sequence[Use], stream: Stream, original: Stream | None
    ) -> dict[int, Collector]:
        need = self.method.need
        assert need is not None
        collectors = {item: Collector(site.shape[2], need) for item in range(site.shape[0])}
        source = original if original is not None and self.method.calibration == "independent" else stream
        for use in {use.items: use for use in uses}.values():
            others = (
                _inputs(original, site, use) if original is not None and need == "cross" else itertools.repeat(None)
            )
            for rows, dense in zip(_inputs(source, site, use), others, strict=False):
                alike = dense is not None and all(dense[item].shape == x.shape for item, x in rows.items())
                for item, x in rows.items():
                    collectors[item].add(x, dense[item] if alike and dense is not None else x)  # rule 5
        return collectors

    def _dense_moments(
        self, stops: Sequence[Stop], module: GraphModule, given: list[list[Tensor]]
    ) -> dict[str, dict[int, Moments]]:
        """Rule 2."""
        need = self.method.need
        if not stops or need is None:
            return {}
        uses = [(site, use) for stop in stops for site in stop.sites for use in stop.uses[site.name]]
        place = {node: i for i, node in enumerate(module.graph.nodes)}
        collectors = {
            site.name: {item: Collector(site.shape[2], need) for item in range(site.shape[0])} for site, _ in uses
        }
        stream = Stream(module, given)
        for site, use in sorted(uses, key=lambda each: place[each[1].node]):
            stream.advance(use.node)
            for rows in _inputs(stream, site, use):
                for item, x in rows.items():
                    collectors[site.name][item].add(x, x)
        return {name: {item: one.finish(name) for item, one in each.items()} for name, each in collectors.items()}


def _solver_bytes(stop: Stop, method: Method) -> int:
    """What the sites of a stop take in memory while they are solved, about: moments, and weights twice."""
    moments = max(nbytes(site.shape[2], method.need) * site.shape[0] for site in stop.sites)
    return moments + 2 * 4 * sum(math.prod(site.shape) for site in stop.sites)


def _inputs(stream: Stream, site: Site, use: Use) -> Iterator[dict[int, Tensor]]:
    """The inputs (tokens, cols) of each matrix that a use reads, batch by batch."""
    for arguments, x in stream.at(use.node, use.source):
        yield dict(matrices(use.node, site, arguments, x, list(use.items)))


def _share(batches: Sequence[dict[str, Tensor]]) -> Sequence[dict[str, Tensor]]:
    """This process's share of the batches. Raises UsageError where processes were given different ones."""
    import torch
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return batches
    rank, world = distributed.get_rank(), distributed.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
    distributed.all_gather(counts, torch.tensor([len(batches)]))
    found = [int(count) for count in counts]
    if len(set(found)) > 1 or len(batches) < world:
        raise UsageError(
            f"the {world} processes were given {', '.join(map(str, found))} calibration batches; give every process "
            f"the same batches, at least {world}: each takes its own share of them"
        )
    return batches[rank::world]


def _put(program: Program, site: Site, entry: Entry, result: Result) -> None:
    """Put what was solved into the program and the result."""
    from torch import nn

    site.write(program.module, entry.weight)
    if entry.bias is not None and (bias := bias_of(program.module, site)) is not None:
        old = _fx.get_tensor(program.module, bias)
        _fx.set_tensor(program.module, bias, nn.Parameter(entry.bias, old.requires_grad))
    result.sites[site.name] = site.replace(selection=entry.selection, retained=entry.retained)
    if entry.error is not None:
        result.errors[site.name] = entry.error
    if entry.note:
        result.notes[site.name] = entry.note
