"""How fast each kind of layer is predicted to be here: what a backend knows of its kernels, without measuring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

from sparsec import cost, registry, timing
from sparsec.backend import Backend
from sparsec.cost import Basis
from sparsec.errors import UsageError
from sparsec.layout import Values
from sparsec.pattern import Pattern


@dataclass(frozen=True)
class Layer:
    """Sites of one shape and pattern: times faster than their dense products, by token count."""

    rows: int
    cols: int
    pattern: str
    sites: int
    speeds: tuple[float, ...]
    basis: Basis


def predicted(manifest: Mapping[str, Any]) -> list[Layer]:
    """For each shape and pattern of sites with a sparse kernel; empty where no backend of the artifact predicts speed.

    Left out: a kind for which only a formula is known while the dense product was measured here; they do not compare.
    """
    stored = manifest["values"].get("type", "fp32")
    values = cast(Values, stored if stored in get_args(Values) else "fp32")
    kinds: dict[tuple[int, int, int, str], int] = {}
    for site in manifest["sites"]:
        if site["pattern"] and any(one["sparse"] for one in site["verdicts"].values()):
            batch, rows, cols = site["shape"]
            key = (batch, rows, cols, site["pattern"])
            kinds[key] = kinds.get(key, 0) + 1
    for name in manifest["backends"]:
        try:
            return list(_layers(registry.backend(name), kinds, values))
        except UsageError:
            continue  # it predicts nothing, or is not installed here
    return []


def _layers(backend: Backend, kinds: Mapping[tuple[int, int, int, str], int], values: Values) -> Iterator[Layer]:
    for (batch, rows, cols, text), count in kinds.items():
        pattern, shape = Pattern.parse(text).executable, (batch, rows, cols)
        basis = backend.cost_basis(pattern, values)
        speeds = [cost.speed(backend.cost, shape, pattern, (tokens,), values) for tokens in timing.TOKENS]
        if basis == backend.cost_basis(cost.DENSE, values):
            yield Layer(rows, cols, text, count, tuple(speeds), basis)
