"""Where in the graph each site is pruned: before its first use, together with all that read the same value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.oneshot.operands import input_of, items_of
from sparsec.uses import operation

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

    from sparsec.sites import Site


@dataclass(frozen=True)
class Use:
    """One call that reads some of a site's matrices."""

    node: Node
    source: Node
    """What gives the activations."""
    items: tuple[int, ...]


@dataclass(frozen=True)
class Stop:
    """Sites that are pruned before `node` runs, and how each is used."""

    node: Node
    sites: tuple[Site, ...]
    uses: dict[str, tuple[Use, ...]]

    @property
    def shared(self) -> bool:
        """Whether the weight is also used elsewhere, on other inputs: those are not known here yet."""
        return len({use.source for uses in self.uses.values() for use in uses}) > 1


def find_stops(module: GraphModule, sites: Sequence[Site]) -> list[Stop]:
    """The stops in graph order. A site with several inputs (a layer that is called twice) has one of its own."""
    place = {node: i for i, node in enumerate(module.graph.nodes)}
    nodes = {node.name: node for node in module.graph.nodes}
    groups: dict[tuple[Node, str], list[Site]] = {}
    uses: dict[str, tuple[Use, ...]] = {}
    for site in sites:
        users = sorted((nodes[name] for name in site.users), key=place.__getitem__)
        uses[site.name] = tuple(Use(node, input_of(node, site), tuple(items_of(module, node, site))) for node in users)
        sources = {use.source for use in uses[site.name]}
        alone = site.name if len(sources) > 1 else ""
        groups.setdefault((uses[site.name][0].source, alone), []).append(site)
    stops = []
    for members in groups.values():
        first = min((uses[site.name][0].node for site in members), key=place.__getitem__)
        stops.append(Stop(first, tuple(members), {site.name: uses[site.name] for site in members}))
    return sorted(stops, key=lambda stop: place[stop.node])


def bias_of(module: GraphModule, site: Site) -> str | None:
    """The bias parameter of a layer, where it is one vector of the site's rows that nothing else reads; else None."""
    names = set()
    for user in site.users:
        node = _fx.find(module, user)
        place = {"linear": 2, "addmm": 0, "conv1d": 2, "conv2d": 2}.get(operation(node))
        if place is None or len(node.args) <= max(place, 1) or len(site.users) > 1:
            return None
        bias = node.args[place]
        if getattr(bias, "op", "") != "get_attr":
            return None
        names.add(str(bias.target))
    name = names.pop()
    readers = [user for read in _fx.reads(module, name) for user in read.users]
    rows = site.shape[0] * site.shape[1]
    return name if len(readers) == 1 and _fx.get_tensor(module, name).numel() == rows else None
