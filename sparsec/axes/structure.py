"""How an axis of a parameter is made of atoms: counted through as a product, or laid end to end as a sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sparsec.axes.atoms import Atom, Atoms, Axis


@dataclass(frozen=True)
class Leaf:
    """An atom on a parameter's axis."""

    atom: Atom
    size: int


@dataclass(frozen=True)
class Product:
    """An axis that counts through its factors, outermost first."""

    factors: tuple[Structure, ...]


@dataclass(frozen=True)
class Sum:
    """An axis of consecutive parts."""

    parts: tuple[Structure, ...]


Structure = Leaf | Product | Sum


def structure_of(atoms: Atoms, axis: Axis) -> Structure:
    """How an axis of fixed size is made of atoms, by the representatives of their classes."""
    found: list[Structure] = []
    for atom in atoms.flat(axis):
        parts = tuple(structure_of(atoms, part) for part in atoms.parts(atom))
        found.append(Sum(parts) if parts else Leaf(atom, atoms.size((atom,)).count))
    return found[0] if len(found) == 1 else Product(tuple(found))


def leaves(structure: Structure) -> Iterator[Leaf]:
    """The atoms of an axis, in order."""
    if isinstance(structure, Leaf):
        yield structure
        return
    for inner in structure.factors if isinstance(structure, Product) else structure.parts:
        yield from leaves(inner)


def length(structure: Structure) -> int:
    """The size of an axis."""
    if isinstance(structure, Leaf):
        return structure.size
    if isinstance(structure, Sum):
        return sum(map(length, structure.parts))
    total = 1
    for factor in structure.factors:
        total *= length(factor)
    return total


def places(structure: Structure, atom: Atom) -> Iterator[tuple[int, int]]:
    """For each place of an atom, the sizes of what lies outside and inside it in its products."""
    if isinstance(structure, Leaf):
        if structure.atom == atom:
            yield 1, 1
        return
    if isinstance(structure, Sum):
        for part in structure.parts:
            yield from places(part, atom)
        return
    for i, factor in enumerate(structure.factors):
        before, after = (length(Product(rest)) for rest in (structure.factors[:i], structure.factors[i + 1 :]))
        for outer, inner in places(factor, atom):
            yield before * outer, inner * after
