"""What hypothesis draws: patterns, shapes around every tail, scores with and without ties."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from sparsec.intersection import Intersection
from sparsec.pattern import NM, VNM, Pattern, Strip, Unstructured
from sparsec.selection import Selection, as_stored

KINDS = ("normal", "ties", "zeros", "spikes")


@st.composite
def nm_patterns(draw: st.DrawFn, largest_m: int = 20) -> NM:
    m = draw(st.integers(1, largest_m))
    return NM(draw(st.integers(1, m)), m)


def vnm_patterns(largest_v: int = 7, largest_m: int = 20) -> st.SearchStrategy[VNM]:
    return st.builds(VNM, st.integers(1, largest_v), st.just(2), st.integers(4, largest_m))


def strip_patterns(largest_v: int = 7, largest_m: int = 20) -> st.SearchStrategy[Strip]:
    return st.builds(Strip, st.integers(1, largest_v), st.just(2), st.integers(4, largest_m))


@st.composite
def moved_selections(draw: st.DrawFn, pattern: Strip, score: Tensor) -> Selection:
    """Of a strip pattern, any rows in a strip; of a score (batch, rows, cols)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = torch.stack([torch.randperm(score.shape[1], generator=generator) for _ in score])
    return pattern.select(score, pattern.project(as_stored(score, rows)).columns, rows)


def unstructured_patterns() -> st.SearchStrategy[Unstructured]:
    return st.builds(Unstructured, st.floats(0, 1, exclude_min=True, exclude_max=True))


@st.composite
def intersections(draw: st.DrawFn, largest_m: int = 9) -> Intersection:
    """Of two patterns of which the first does not imply the second."""
    first = draw(st.one_of(nm_patterns(largest_m), vnm_patterns(largest_m=largest_m)))
    second = draw(nm_patterns(largest_m).filter(lambda pattern: not first.implies(pattern)))
    return Intersection(first, second)


def decidable_patterns() -> st.SearchStrategy[Pattern]:
    """Those that a weight shows by itself to follow."""
    return st.one_of(nm_patterns(), vnm_patterns(), unstructured_patterns(), intersections())


def sparse_patterns() -> st.SearchStrategy[Pattern]:
    return st.one_of(decidable_patterns(), strip_patterns())


def shapes(batch: int = 3, rows: int = 12, cols: int = 25) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(st.integers(1, batch), st.integers(1, rows), st.integers(1, cols))


@st.composite
def weights(draw: st.DrawFn, shape: tuple[int, int, int] | None = None) -> Tensor:
    """Weights with signed zeros: normal, with many equal values, all zero, or mostly zero with large ones."""
    shape = shape or draw(shapes())
    kind, generator = draw(st.sampled_from(KINDS)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(shape, generator=generator)
    if kind == "ties":
        return noise.round()
    if kind == "zeros":
        return noise * 0.0
    return torch.where(noise.abs() > 1.5, noise * 1e6, noise * 0.0) if kind == "spikes" else noise


def scores(shape: tuple[int, int, int] | None = None) -> st.SearchStrategy[Tensor]:
    return weights(shape).map(torch.abs)
