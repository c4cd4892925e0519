"""The table of all sites, and the same figures as a grid of kinds of sites by layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsec.report.facts import Manifest
from sparsec.report.stored import Stored

Site = Mapping[str, Any]
Value = Callable[[Site], float | None]


class Cell(NamedTuple):
    """What a cell shows, and what it is sorted by; None is sorted last."""

    text: str
    value: float | str | None


class Column(NamedTuple):
    """A column of the table: its head, what it means, and its cells by site."""

    label: str
    words: str
    cell: Callable[[Site], Cell]
    numeric: bool = True


class Row(NamedTuple):
    """One site, by its name and by what is shown of it."""

    name: str
    short: str
    sparse: bool
    cells: tuple[Cell, ...]


class Grid(NamedTuple):
    """A figure of all numbered sites: a row for each kind, a column for each layer; None where there is none."""

    title: str
    words: str
    kinds: tuple[str, ...]
    layers: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


def columns(manifest: Manifest, stored: Mapping[str, Stored]) -> list[Column]:
    """The columns that this artifact has something to put in."""
    error, before = _solver_errors(manifest), _before_permuting(manifest)
    made = [
        Column("Role", "What the layer is for", lambda site: _text(site["role"]), False),
        Column("Shape", "Rows x columns; sorted by the number of weights", _shape),
        Column("Pattern", "What the weights follow", lambda site: _text(site["pattern"] or "dense"), False),
        Column("Kept", "Share of the summed score that the pattern keeps", lambda site: _number(site["retained"])),
        Column("Density", "Share of weights that are not zero, counted in the tables", _density(stored)),
        Column("Bytes", "Of the dense weight's bytes", _bytes),
    ]
    if before:
        words = "Kept before channels were permuted"
        made.insert(4, Column("Kept before", words, lambda site: _number(before.get(site["name"]))))
    if error:
        words = "Relative error of the layer's outputs after its weights were solved, on calibration data"
        made.append(Column("Error", words, lambda site: _number(error.get(site["name"]))))
    runs = [Column(name, f"What the {name} backend runs", _kernel(name), False) for name in manifest["backends"]]
    return made + runs


def rows(manifest: Manifest, of: Sequence[Column]) -> list[Row]:
    """A row for each site, in the order of the model."""
    return [
        Row(site["name"], short(site["name"]), bool(site["pattern"]), tuple(one.cell(site) for one in of))
        for site in manifest["sites"]
    ]


def short(name: str) -> str:
    """A site's name without what nearly all of them end in."""
    return name.removesuffix(".weight")


def grids(manifest: Manifest, stored: Mapping[str, Stored]) -> list[Grid]:
    """The figures that differ, or could, from site to site."""
    error = _solver_errors(manifest)
    density = {name: one.density for name, one in stored.items()}  # of sparse sites only: no dense weight is read
    made: list[tuple[str, str, Value]] = [
        ("Retained score", "share of the summed score that stays", lambda site: site["retained"]),
        ("Mask density", "share of weights that are not zero", lambda site: density.get(site["name"])),
        ("Error of outputs", "relative, on calibration data", lambda site: error.get(site["name"])),
    ]
    found = [_grid(title, words, value, manifest["sites"]) for title, words, value in made]
    return [one for one in found if any(value is not None for row in one.values for value in row)]


def _grid(title: str, words: str, value: Value, sites: Sequence[Site]) -> Grid:
    placed: dict[tuple[str, int], float | None] = {}
    for site in sites:
        if number := re.search(r"\d+", site["name"]):
            kind = f"{site['name'][: number.start()]}*{site['name'][number.end() :]}".removesuffix(".weight")
            placed[kind, int(number[0])] = value(site)
    kinds, layers = list(dict.fromkeys(kind for kind, _ in placed)), sorted({layer for _, layer in placed})
    values = tuple(tuple(placed.get((kind, layer)) for layer in layers) for kind in kinds)
    return Grid(title, words, tuple(_behind_number(kind) for kind in kinds), tuple(layers), values)


def _behind_number(kind: str) -> str:
    """`bert.encoder.layer.*.output.dense` -> `output.dense`: what stands behind the layer's number."""
    return kind.partition("*.")[2] or kind


def _solver_errors(manifest: Manifest) -> dict[str, float]:
    """Of the last pass that measured them."""
    found = [one["error"] for one in manifest.get("passes", ()) if isinstance(one.get("error"), dict)]
    return dict(found[-1]) if found else {}


def _before_permuting(manifest: Manifest) -> dict[str, float]:
    found = [one["retained"] for one in manifest.get("passes", ()) if isinstance(one.get("retained"), dict)]
    return {name: shares[0] for name, shares in found[-1].items()} if found else {}


def _text(text: str) -> Cell:
    return Cell(text, text)


def _number(value: float | None) -> Cell:
    return Cell("" if value is None else f"{value:.3f}", value)


def _shape(site: Site) -> Cell:
    batch, rows, cols = site["shape"]
    return Cell(f"{f'{batch} x ' if batch > 1 else ''}{rows} x {cols}", batch * rows * cols)


def _density(stored: Mapping[str, Stored]) -> Callable[[Site], Cell]:
    def cell(site: Site) -> Cell:
        return _number(stored[site["name"]].density if site["name"] in stored else None)

    return cell


def _bytes(site: Site) -> Cell:
    ratio = site["nbytes_sparse"] / site["nbytes_dense"] if site["nbytes_sparse"] and site["nbytes_dense"] else 1.0
    return Cell(f"{ratio:.2f}x", ratio)


def _kernel(backend: str) -> Callable[[Site], Cell]:
    return lambda site: _text(site["verdicts"].get(backend, {}).get("kernel", "dense"))
