"""What the tables of an artifact say about each sparse weight: its density, a sample of its numbers, pictures of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec import store
from sparsec.artifact import Artifact
from sparsec.errors import ArtifactError
from sparsec.layout import SparseLayout, decompress
from sparsec.report import pictures
from sparsec.report.pictures import Picture
from sparsec.selection import as_stored

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLE = 20_000  # numbers of a weight that its histogram is drawn from
_MAP_POINTS, _CLOSE_POINTS = 600_000, 250_000  # of all pictures of a page: it must stay small however many sites


@dataclass(frozen=True)
class Stored:
    """One sparse weight as it is stored."""

    density: float
    """Share of weights that are not zero."""
    sample: Tensor
    """Evenly spaced weights that are not zero, (count,) float32."""
    pictures: tuple[Picture, ...]


def read(artifact: Artifact) -> dict[str, Stored]:
    """By the name of each sparse site. Tables are checked as they are read. Raises ArtifactError naming a site.

    Empty where the artifact has no tables of sparsec's own: it was not compiled for the kernel backend.
    """
    if store.GRAPH not in artifact.manifest["files"]:
        return {}
    from sparsec.lowered import packed_calls
    from sparsec.program import read_graph

    layouts = {call.site: call.layout for call in packed_calls(read_graph(artifact.root))}
    sparse = [site for site in artifact.manifest["sites"] if site["pattern"]]
    for site in sparse:
        _check(artifact, site, layouts.get(site["name"]))
    sizes = pictures.Sizes.shared(_MAP_POINTS, _CLOSE_POINTS, len(sparse))
    return {site["name"]: _look(layouts[site["name"]], sizes) for site in sparse}


def _check(artifact: Artifact, site: Mapping[str, Any], layout: SparseLayout | None) -> None:
    name, shape = site["name"], tuple(site["shape"])
    if layout is None:
        raise ArtifactError(
            f"{artifact.root}: {name} is sparse by {store.MANIFEST}, and {store.GRAPH} has no tables for it; the files "
            "do not belong together: compile it again"
        )
    if layout.shape != shape:
        raise ArtifactError(
            f"{artifact.root}: {name} has shape {shape} by {store.MANIFEST}, and tables of {layout.shape}; the files "
            "do not belong together: compile it again"
        )


def _look(layout: SparseLayout, sizes: pictures.Sizes) -> Stored:
    import torch

    weight = decompress(layout, torch.float32)
    first = as_stored(weight, layout.rows)[0]  # strips of moved rows come together
    kept = weight[weight != 0]
    share = kept.numel() / max(weight.numel(), 1)
    return Stored(share, spaced(kept), pictures.of(first, layout.pattern, sizes))


def spaced(numbers: Tensor) -> Tensor:
    """At most `_SAMPLE` of them, (count,) float32, evenly spaced and always the same."""
    flat = numbers.flatten()
    return flat[:: math.ceil(flat.numel() / _SAMPLE) or 1].float().clone()
