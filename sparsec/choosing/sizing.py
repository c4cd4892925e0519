"""What patterns take of a budget, site by site: seconds by the backend's cost table and a profile of the dense program,
and how many weights are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.choosing.options import Chosen, Option, Weight, kept, kept_of, seconds_of, total
from sparsec.choosing.request import Request
from sparsec.errors import SparsecError, UsageError
from sparsec.explain import Variant, plan, survey, table
from sparsec.pattern import Pattern
from sparsec.prediction import Layer, Survey, predict

if TYPE_CHECKING:
    from sparsec.backend import Backend
    from sparsec.pipeline import Progress
    from sparsec.program import Program
    from sparsec.sites import Site


@dataclass
class Sizer:
    """Sizes patterns for the sites of a program that have none yet."""

    program: Program
    backend: Backend | None
    """Of no matter to a budget of density."""
    request: Request
    progress: Progress

    def __post_init__(self) -> None:
        self.free = [site for site in self.program.sites if site.eligible and site.pattern is None]
        self.variants: dict[str, Variant] = {}
        self.known: Survey | None = None
        self.layers: dict[str, dict[str, Layer]] = {}
        self.weights = {site.name: kept(None, site.shape) for site in self.program.sites}

    def prepare(self, texts: Sequence[str]) -> None:
        """Learn what these patterns take: of time, the program is profiled and what is not measured yet measured.

        Raises SparsecError where no site has a sparse kernel for any of them, UsageError where no cost is known.
        """
        if not self.request.timed:
            return
        if self.backend is None:
            raise UsageError(
                f"a budget of {self.request.budget} must know what layers cost on this machine, and no cost is known "
                "here; compile gives one, in Python pass Context(cost=backend.cost); or ask for a density"
            )
        values = self.request.values
        new = {text: self._plan(text) for text in texts if text not in self.variants}
        self.variants |= new
        running = [one for one in new.values() if one.patterns]
        if self.known is None:
            if not any(self._own(one) for one in running):
                reasons = (v.reason for one in new.values() for v in one.verdicts.values() if not v.sparse)
                raise SparsecError(f"no candidate has a sparse kernel here: {next(reasons, 'no site is left')}")
            self.known = survey(self.program, self.backend, running, [self.request.tokens], self.progress)
        patterns = {pattern for one in running for pattern in one.patterns.values()}
        self.backend.calibrate(sorted(patterns, key=str), values, self.progress)
        seconds = table(self.backend, values, self.known)
        for one in running:
            made = predict(self.known, self.known.profiles[0], one.patterns, seconds)
            self.layers[one.name] = {layer.site: layer for layer in made.layers}

    def options(self, text: str) -> Chosen:
        """What each free site would take with a pattern that was prepared; those without a kernel are not there."""
        pattern = Pattern.parse(text)
        if not self.request.timed:
            return {site.name: Option(text, 0.0, 0.0, kept(pattern, site.shape)) for site in self.free}
        layers = self.layers.get(text, {})
        return {
            site.name: Option(text, layers[site.name].sparse, 0.0, kept(pattern, site.shape))
            for site in self.free
            if site.name in layers
        }

    @property
    def dense(self) -> Chosen:
        """Every free site that has an option, as it is."""
        names = {name for text in (self.variants if self.request.timed else ()) for name in self.layers.get(text, ())}
        found = {}
        for site in self.free:
            if site.name in names or not self.request.timed:
                found[site.name] = Option(None, self._dense_seconds(site.name), 0.0, self.weights[site.name])
        return found

    @property
    def fixed(self) -> Chosen:
        """The sites whose pattern was set before."""
        found = {}
        for site in self.program.sites.sparse:
            layer = next((each[site.name] for each in self.layers.values() if site.name in each), None)
            seconds = layer.sparse if layer else 0.0  # without kernel, its time is part of the rest
            found[site.name] = Option(str(site.pattern), seconds, 0.0, kept(site.pattern, site.shape))
        return found

    @property
    def weight(self) -> Weight:
        """What an option takes of the budget."""
        return seconds_of if self.request.timed else kept_of

    @property
    def dense_seconds(self) -> float:
        """Of a run of the whole program."""
        return self.known.profiles[0].seconds if self.known else 0.0

    @property
    def tokens(self) -> int:
        """Of that run."""
        return self.known.profiles[0].tokens if self.known else self.request.tokens

    def rest(self, chosen: Chosen) -> float:
        """What all that is not in a choice takes of the budget."""
        if self.request.timed:
            return self.dense_seconds - sum(map(self._dense_seconds, chosen))
        return sum(self.weights.values()) - sum(self.weights[name] for name in chosen)

    def seconds(self, chosen: Chosen) -> float:
        """Of a run with a choice that is complete, fixed sites included."""
        return self.dense_seconds - sum(map(self._dense_seconds, chosen)) + total(chosen, seconds_of)

    def density(self, chosen: Chosen) -> float:
        """Share of the weights of all sites that a complete choice keeps."""
        every = sum(self.weights.values())
        return (every - sum(self.weights[name] for name in chosen) + total(chosen, kept_of)) / every

    def limit(self) -> float:
        """The budget, in the unit of `weight`. Raises UsageError where dense meets it already."""
        if self.request.budget == "density":
            return self.request.amount * sum(self.weights.values())
        if self.request.budget == "speedup":
            return self.dense_seconds / self.request.amount
        if self.request.amount / 1e3 >= self.dense_seconds:
            raise UsageError(
                f"latency {self.request.amount:g} ms asks for nothing: the dense model takes "
                f"{1e3 * self.dense_seconds:.2f} ms at {self.tokens} tokens on this machine; ask for less"
            )
        return self.request.amount / 1e3

    def why(self, site: Site) -> str:
        """Why a site without pattern has no options."""
        reasons = [one.verdicts[site.name].reason for one in self.variants.values() if site.name in one.verdicts]
        return site.excluded or next(filter(None, reasons), "no option")

    def _plan(self, text: str) -> Variant:
        assert self.backend is not None
        targets = dict.fromkeys((site.name for site in self.free), text)
        return plan(self.program, self.backend, text, targets, self.request.values, ())

    def _own(self, variant: Variant) -> bool:
        return any(site.name in variant.patterns for site in self.free)

    def _dense_seconds(self, name: str) -> float:
        return next((each[name].dense for each in self.layers.values() if name in each), 0.0)
