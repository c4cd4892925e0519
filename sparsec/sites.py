"""Sites: the weights of a program that may become sparse, and the parameters that may not, each with the reason."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.columns import Solver
from sparsec.errors import GraphError, PatternError, UsageError
from sparsec.pattern import Pattern
from sparsec.selection import Selection, as_stored, in_place
from sparsec.view import WeightView

if TYPE_CHECKING:
    from torch import Tensor, nn

PRUNED_FROM = 0.05
"""The share of zeros from which on a weight counts as pruned; trained dense weights hold hardly any."""


@dataclass(frozen=True)
class Site:
    """One weight, as rows (outputs) x cols (inputs, the axis patterns run along). Replaced, never changed."""

    name: str
    """The parameter's name in the model."""
    view: WeightView
    """How the parameter is seen as matrices (batch, rows, cols)."""
    users: tuple[str, ...]
    """The graph nodes that compute with the weight."""
    role: str
    """What the layer does, found from the graph: attention.query, ffn.up, pooler, head, ..."""
    kind: str = "linear"
    """How the graph uses it: linear, conv1d_hf, matmul, einsum, conv1d, conv2d or experts (see `uses`)."""
    aliases: tuple[str, ...] = ()
    """Other names of the same parameter (tied weights)."""
    excluded: str | None = None
    """Why the site stays dense, or None."""
    pattern: Pattern | None = None
    mask: str | None = None
    """Name of the bool buffer (rows, cols) while a mask is in the graph."""
    selection: Selection | None = None
    retained: float | None = None
    """Share of the summed score that the selection keeps, 0 to 1."""
    rows: Tensor | None = None
    """Which rows share a strip, as `Selection.rows`, where that was decided before columns are chosen."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, rows, cols); batch is 1 for a linear layer."""
        return self.view.shape

    def read(self, module: nn.Module) -> Tensor:
        """The weight as (batch, rows, cols), detached; it may share the parameter's memory and is not to be written."""
        return self.view.to_matrices(_fx.get_tensor(module, self.name).detach())

    def write(self, module: nn.Module, weight: Tensor) -> None:
        """Put a new (batch, rows, cols) weight in place. The old parameter is left as it is for others who hold it."""
        from torch import nn

        old = _fx.get_tensor(module, self.name)
        if weight.numel() != old.numel():
            raise GraphError(f"{self.name}: expected a weight of shape {self.shape}, found {tuple(weight.shape)}")
        new = nn.Parameter(self.view.to_parameter(weight.detach().to(old.dtype)), old.requires_grad)
        _fx.set_tensor(module, self.name, new)

    def choose(self, score: Tensor, columns: Solver = "greedy") -> tuple[Selection, Tensor]:
        """`Pattern.choose` of a score (batch, rows, cols), for strips of the site's `rows` where it has some."""
        assert self.pattern is not None
        selection, mask = self.pattern.choose(as_stored(score, self.rows), columns)
        return dataclasses.replace(selection, rows=self.rows), in_place(mask, self.rows)

    def replace(self, **changes: Any) -> Site:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def eligible(self) -> bool:
        """Whether the site has, or may be given, a sparse pattern."""
        return self.excluded is None


@dataclass(frozen=True)
class Exclusion:
    """A parameter that is no site: its name, its role in the graph and why it stays as it is."""

    name: str
    role: str
    reason: str


@dataclass(frozen=True)
class SiteTable:
    """The sites of a program in graph order, and the parameters that are none."""

    sites: tuple[Site, ...] = ()
    exclusions: tuple[Exclusion, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, name: str) -> Site:
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)

    def replace(self, changed: Iterable[Site]) -> SiteTable:
        """A table in which the sites of the same names are replaced."""
        by_name = {site.name: site for site in changed}
        return dataclasses.replace(self, sites=tuple(by_name.get(site.name, site) for site in self.sites))

    @property
    def sparse(self) -> tuple[Site, ...]:
        """The sites that have a pattern."""
        return tuple(site for site in self.sites if site.pattern is not None)

    def with_targets(self, targets: Mapping[str, str], include: tuple[str, ...] = ()) -> SiteTable:
        """Give patterns to sites. `targets`: selector -> pattern text or `ignore`, later ones win.

        A selector is `*` (every site not excluded), `re:REGEX` (searched in the name) or an exact name; one other than
        `*` includes excluded sites. `include` names roles that are not to be excluded. Raises UsageError when a
        selector matches nothing: a typo must never give a silently dense model.
        """
        roles = {site.role for site in self.sites}
        if unknown := [role for role in include if role not in roles]:
            raise UsageError(f"no site has the role {unknown[0]!r}; there are {', '.join(sorted(roles))}")
        sites = [s.replace(excluded=None) if s.role in include and s.excluded else s for s in self.sites]
        for selector, text in targets.items():
            pattern = None if text == "ignore" else Pattern.parse(text)
            matched = [i for i, site in enumerate(sites) if _matches(selector, site)]
            if not matched:
                raise UsageError(self._no_match(selector, text))
            for i in matched:
                sites[i] = _assign(sites[i], pattern, selector)
        return dataclasses.replace(self, sites=tuple(sites))

    def refuse_silent(self) -> None:
        """Raise UsageError where a site has neither a pattern nor a reason to be dense."""
        silent = [site.name for site in self.sites if site.pattern is None and not site.excluded]
        if silent:
            raise UsageError(
                f"{len(silent)} sites would silently stay dense, the first is {silent[0]}; give them a pattern with "
                "--layer or --pattern, exclude them with --ignore, or add --allow-dense"
            )

    def _no_match(self, selector: str, text: str) -> str:
        if selector != "*":
            some = ", ".join(site.name for site in self.sites[:3])
            return f"{selector!r} (for {text}) matches none of the {len(self)} sites; their names look like {some}"
        excluded = [site for site in self.sites if not site.eligible]
        if not excluded:
            others = [f"{entry.name}: {entry.reason}" for entry in self.exclusions if entry.role == "other"]
            return f"the model has no linear weight that {text} could be applied to{'; ' + others[0] if others else ''}"
        reasons = ", ".join(sorted({f"{site.name}: {site.excluded}" for site in excluded})[:3])
        return f"no site is left for {text}: all {len(excluded)} are excluded ({reasons}); name one with --layer"


def _matches(selector: str, site: Site) -> bool:
    if selector == "*":
        return site.eligible
    if selector.startswith("re:"):
        try:
            return re.search(selector[3:], site.name) is not None
        except re.error as error:
            raise UsageError(f"{selector!r} is not a regular expression: {error}") from None
    return selector == site.name


def _assign(site: Site, pattern: Pattern | None, selector: str) -> Site:
    if pattern is None:
        return site.replace(pattern=None, excluded=f"ignored by {selector!r}")
    if site.selection is not None and site.pattern != pattern:
        raise PatternError(
            f"{site.name} already holds {site.pattern}; a site's pattern is set once, found also {pattern}"
        )
    if pattern.density == 1:
        return site.replace(pattern=None, excluded=f"{pattern} by {selector!r}")
    return site.replace(pattern=pattern, excluded=None)
