"""What a pattern does to a layer's outputs on calibration data, layer by layer, each alone in the dense model.

1. The dense model runs once, all samples side by side; a site's Gram matrix is measured when its input is there, and
   freed when the last site that reads it is done.
2. The pattern keeps what Optimal Brain Surgeon scores highest; a few steps of least squares adapt what is kept. That is
   cheaper than the solvers of `oneshot`, and ranks patterns as they do.
3. Large weights are looked at in strips of rows spread evenly.
4. Every output counts alike, by its own relative error: one output of a layer can hold nearly all of its energy (the
   outliers of BERT), and the others would be lost unseen.
5. Where a layer has a bias of its own, inputs count about their mean: the bias can make up for the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.choosing.scoring import some_rows
from sparsec.errors import SparsecError
from sparsec.oneshot.moments import Collector, Moments
from sparsec.oneshot.operands import matrices
from sparsec.oneshot.refit import solve
from sparsec.oneshot.stops import Use, bias_of, find_stops
from sparsec.oneshot.stream import Stream
from sparsec.pattern import Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.pipeline import Progress
    from sparsec.program import Program
    from sparsec.sites import Site

_STEPS = 3  # of the refit
_DAMPING = 0.01  # of the mean square input, added to the Gram matrix
_RAISES = 4  # times that it is multiplied by 10 where the matrix is singular
_ROWS, _WIDE, _ROWS_WHERE_WIDE = 256, 1024, 128  # rows looked at; beyond so many columns, fewer


def errors(
    program: Program,
    wanted: Mapping[str, Sequence[str]],
    batches: Sequence[Mapping[str, Tensor]],
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """||x w - x w0||^2 / ||x w0||^2, the mean over rows w of the weight, by site and pattern text.

    `wanted`: the patterns to try for each site.

    A site that no sample reaches is left out. Raises SparsecError naming the site where inputs are not finite.
    """
    return _Walk(program, wanted, batches, progress).run()


class _Walk:
    def __init__(
        self,
        program: Program,
        wanted: Mapping[str, Sequence[str]],
        batches: Sequence[Mapping[str, Tensor]],
        progress: Progress,
    ) -> None:
        self.program, self.wanted, self.progress = program, wanted, progress
        self.stops = find_stops(program.module, [site for site in program.sites if site.name in wanted])
        self.stream = Stream(program.module, [[batch[name] for name in program.inputs] for batch in batches])
        self.collectors: dict[Any, dict[int, Collector]] = {}
        self.moments: dict[Any, dict[int, Moments]] = {}
        self.seen: dict[Any, set[tuple[Any, int]]] = {}
        self.found: dict[str, dict[str, float]] = {}

    def run(self) -> dict[str, dict[str, float]]:
        place = {node: i for i, node in enumerate(self.program.module.graph.nodes)}
        uses = [(use, site, stop) for stop in self.stops for site in stop.sites for use in stop.uses[site.name]]
        uses.sort(key=lambda each: place[each[0].node])
        keys = {site.name: _key(site, stop.uses[site.name], stop.shared) for _, site, stop in uses}
        left = Counter(site.name for _, site, _ in uses)  # uses that are still to come
        readers = Counter(keys.values())  # sites that still need the moments
        for use, site, _ in uses:
            key = keys[site.name]
            if key not in self.moments:
                self._collect(key, site, use)
            left[site.name] -= 1
            if left[site.name]:
                continue
            if key not in self.moments:
                self.moments[key] = {
                    item: one.finish(site.name) for item, one in self.collectors.pop(key).items() if one.tokens
                }
            self._try(site, self.moments[key])
            readers[key] -= 1
            if not readers[key]:
                del self.moments[key]  # rule 1
        return self.found

    def _collect(self, key: Any, site: Site, use: Use) -> None:
        self.stream.advance(use.node)
        collectors = self.collectors.setdefault(key, {})
        seen = self.seen.setdefault(key, set())
        items = [item for item in use.items if (use.source, item) not in seen]
        seen.update((use.source, item) for item in items)
        for arguments, x in self.stream.at(use.node, use.source):
            for item, rows in matrices(use.node, site, arguments, x, items):
                collectors.setdefault(item, Collector(site.shape[2], "gram")).add(rows)

    def _try(self, site: Site, moments: Mapping[int, Moments]) -> None:
        self.progress("trying patterns", len(self.found), len(self.wanted))
        if not moments:
            return  # no sample reaches it
        weight, patterns = site.read(self.program.module), self.wanted[site.name]
        centred = bias_of(self.program.module, site) is not None  # rule 5
        lost = dict.fromkeys(patterns, 0.0)
        for item, one in moments.items():
            layer = _Layer.of(weight[item], one.centred() if centred else one, site.name)
            for text in patterns:
                lost[text] += layer.lost(Pattern.parse(text)) / len(moments)
        self.found[site.name] = lost


def _key(site: Site, uses: Sequence[Use], shared: bool) -> Any:
    """Sites of one plain input share their moments."""
    plain = site.kind in ("linear", "conv1d_hf") and site.shape[0] == 1 and not shared
    return (uses[0].source, site.shape[2]) if plain else site.name


@dataclass(frozen=True)
class _Layer:
    """Rows of one matrix (rows, cols), and what is known of its inputs."""

    weight: Tensor
    gram: Tensor
    hessian: Tensor
    """The Gram matrix, damped."""
    target: Tensor
    """W0 times that."""
    score: Tensor
    energy: Tensor
    """(rows,): the square of each output, mean over tokens."""

    @staticmethod
    def of(weight: Tensor, moments: Moments, name: str) -> _Layer:
        import torch

        cols = weight.shape[1]
        weight = some_rows(weight.float()[None], _ROWS if cols <= _WIDE else _ROWS_WHERE_WIDE)[0]  # rule 3
        gram, one, damping = moments.gram, torch.eye(cols), _DAMPING
        level = float(gram.diagonal().mean())
        if not level > 0:  # no input is ever other than 0: nothing can be lost
            return _Layer(weight, gram, one, weight, weight.abs(), weight.new_zeros(len(weight)))
        for _ in range(_RAISES):
            hessian = gram + damping * level * one
            factor, failed = torch.linalg.cholesky_ex(hessian)
            if not failed and bool(torch.isfinite(factor).all()):
                spread = torch.cholesky_inverse(factor).diagonal().clamp(min=1e-30)
                score = weight.square() / spread
                return _Layer(weight, gram, hessian, weight @ hessian, score, _size(weight, gram))
            damping *= 10
        raise SparsecError(
            f"{name}: the Gram matrix of its inputs stays singular with damping {damping / 10:g}; give more "
            "calibration data, leave the site out with --ignore, or choose by --objective retained"
        )

    def lost(self, pattern: Pattern) -> float:
        """Squared relative error of an output when pruned, mean over outputs; one that is always 0 loses nothing."""
        import torch

        mask = pattern.mask(pattern.project(self.score), self.weight.shape[1])[0]
        kept = solve(self.target, self.hessian, mask, self.weight, _STEPS)  # rule 2
        gone = _size(kept - self.weight, self.gram)
        return float(torch.where(self.energy > 0, gone / self.energy, 0.0).mean())  # rule 4


def _size(weight: Tensor, gram: Tensor) -> Tensor:
    """(rows,): w G w^T of every row."""
    return ((weight @ gram) * weight).sum(1).double().clamp(min=0)
