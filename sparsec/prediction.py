"""How fast a whole model will be, before anything is pruned: Amdahl's law over a profile of the dense graph.

1. What the sites' products take is the profile's whole less its rest, shared out as the calls were timed one by one.
2. A sparse product takes what the backend predicts, times how much slower or faster the dense products ran in the model
   than the backend predicts for them: both sides then stand for the same state of the machine.
3. An operator that the sparse kernel takes over (an activation) costs nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sparsec.cost import DENSE
from sparsec.pattern import Pattern
from sparsec.profiling import Profile
from sparsec.sites import Site

Seconds = Callable[[Site, Pattern, int], float]
"""Of one product with a site's weight, for so many vectors."""


@dataclass(frozen=True)
class Layer:
    """Seconds in one run of the model that go to one site: as it is, and with its pattern."""

    site: str
    rows: int
    """How many vectors it sees in all its products."""
    dense: float
    sparse: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of one run of the model: dense as profiled, sparse as predicted."""

    tokens: int
    dense: float
    rest: float
    """What no pattern changes: all that is no site, and the sites that stay dense."""
    layers: tuple[Layer, ...]
    """The sites that run sparse."""

    @property
    def sparse(self) -> float:
        """Seconds with every pattern in place."""
        return self.rest + sum(layer.sparse for layer in self.layers)

    @property
    def speed(self) -> float:
        """Times faster than dense."""
        return self.dense / self.sparse

    @property
    def limit(self) -> float:
        """Times faster than dense if sparse layers took no time at all."""
        return self.dense / max(self.rest, 1e-9)


@dataclass(frozen=True)
class Survey:
    """What is known of a dense program: its profiles, and what they were made without."""

    profiles: tuple[Profile, ...]
    sites: tuple[Site, ...]
    """The sites whose products the profiles leave out."""
    absorbed: Mapping[str, str]
    """The operators that they leave out too, because a site's sparse kernel would do them: node -> site."""

    @property
    def left_out(self) -> set[str]:
        """The nodes of all these."""
        return {user for site in self.sites for user in site.users} | self.absorbed.keys()


def predict(survey: Survey, profile: Profile, patterns: Mapping[str, Pattern], seconds: Seconds) -> Prediction:
    """Predict the model whose sites named in `patterns` run sparse, for the inputs of one of the survey's profiles."""
    nodes = {site.name: list(site.users) for site in survey.sites}
    for node, owner in survey.absorbed.items():
        nodes[owner].append(node)
    alone = {name: sum(profile.nodes[node].seconds for node in each) for name, each in nodes.items()}
    # Where noise hides the sites, what their calls took one by one is all there is.
    inside = profile.seconds - profile.rest or min(sum(alone.values()), profile.seconds)
    here = inside / max(sum(alone.values()), 1e-12)  # rule 1
    products = here * sum(profile.nodes[user].seconds for site in survey.sites for user in site.users)
    expected = sum(_total(profile, site, DENSE, seconds) for site in survey.sites)
    pace = products / max(expected, 1e-12)  # rule 2
    layers = tuple(
        Layer(
            site.name,
            sum(profile.nodes[user].rows for user in site.users),
            alone[site.name] * here,
            pace * _total(profile, site, patterns[site.name], seconds),  # rule 3
        )
        for site in survey.sites
        if site.name in patterns
    )
    return Prediction(profile.tokens, profile.seconds, profile.seconds - sum(one.dense for one in layers), layers)


def _total(profile: Profile, site: Site, pattern: Pattern, seconds: Seconds) -> float:
    return sum(seconds(site, pattern, profile.nodes[user].rows) for user in site.users)
