"""Atoms: the factors of tensor axes, in classes that must be permuted alike.

An axis is a product of atoms, outermost first, and `()` for an axis of size 1: attention's hidden axis is
(heads, head size). Every tensor starts with one atom an axis; operators refine atoms and unite them:

1. A view splits an atom into a product; a slice or a cat cuts it into a sum of consecutive parts.
2. Two axes that must be permuted alike become one class, refined to the common structure of both.
3. Where no common structure exists (12 x 64 against 16 x 48), and wherever order matters, atoms are fixed, with a
   reason. Fixing is final and reaches every part.

All three only ever take freedom away, so the order in which operators come does not matter for soundness.
"""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.axes.sizes import ONE, Size

Atom = int
Axis = tuple[Atom, ...]


class Atoms:
    """A union-find of atoms whose classes may be refined into products and sums, and fixed."""

    def __init__(self) -> None:
        self._parent: list[Atom] = []
        self._sizes: list[Size] = []
        self._why: list[str | None] = []
        self._factors: dict[Atom, Axis] = {}
        self._parts: dict[Atom, tuple[Axis, ...]] = {}

    def new(self, size: Size, why: str | None = None) -> Axis:
        """An axis of one new atom, fixed when `why` is given; `()` for size 1."""
        if size == ONE:
            return ()
        self._parent.append(len(self._parent))
        self._sizes.append(size)
        self._why.append(why)
        return (len(self._parent) - 1,)

    def flat(self, axis: Axis) -> Axis:
        """The axis by the representatives of its atoms' classes, products expanded; each is whole or a sum."""
        found: list[Atom] = []
        for atom in axis:
            root = self._root(atom)
            if root in self._factors:
                self._factors[root] = self.flat(self._factors[root])
                found.extend(self._factors[root])
            else:
                found.append(root)
        return tuple(found)

    def size(self, axis: Axis) -> Size:
        """The product of the atoms' sizes."""
        total = ONE
        for atom in axis:
            total = total * self._sizes[atom]
        return total

    def parts(self, atom: Atom) -> tuple[Axis, ...]:
        """The consecutive parts that an atom of a flat axis is cut into; none when it is whole."""
        return self._parts.get(atom, ())

    def why(self, atom: Atom) -> str | None:
        """Why an atom of a flat axis is fixed, or None when it is free."""
        return self._why[atom]

    def fix(self, axis: Axis, why: str) -> None:
        """Forbid every permutation of the axis; the first reason is kept."""
        for atom in self.flat(axis):
            if self._why[atom] is None:
                self._why[atom] = why
                for part in self.parts(atom):
                    self.fix(part, why)

    def unite(self, left: Axis, right: Axis, why: str) -> None:
        """Let two axes of equal size be permuted alike (rule 2); `why` is the reason where they cannot (rule 3)."""
        while left or right:
            left, right = self.flat(left), self.flat(right)
            if not left or not right:
                self.fix(left + right, why)  # sizes that differ: one is broadcast in a way no rule knows
                return
            a, b = left[-1], right[-1]
            if a == b or self._sizes[a] == self._sizes[b]:
                self._merge(a, b, why)
                left, right = left[:-1], right[:-1]
            elif self._sizes[a].over(self._sizes[b]):
                self._split(a, self._sizes[b], why)
            elif self._sizes[b].over(self._sizes[a]):
                self._split(b, self._sizes[a], why)
            else:
                self.fix(left + right, why)
                return

    def regroup(self, axis: Axis, sizes: Sequence[Size], why: str) -> list[Axis]:
        """The axes of a row-major view of these sizes on a tensor whose axes, joined, are `axis` (rule 1)."""
        left, result = axis, list[Axis]()
        for at, size in reversed(list(enumerate(sizes))):
            taken: Axis = ()
            while size != ONE:
                left = self.flat(left)
                last = left[-1] if left else None
                if last is not None and (rest := size.over(self._sizes[last])):
                    left, taken, size = left[:-1], (last, *taken), rest
                elif last is not None and self._sizes[last].over(size):
                    self._split(last, size, why)
                else:
                    return [*self._regroup_front(left + taken, sizes[: at + 1], why), *result[::-1]]
            result.append(taken)
        if left:
            self.fix(axis, why)
        return result[::-1]

    def _regroup_front(self, axis: Axis, sizes: Sequence[Size], why: str) -> list[Axis]:
        """`regroup` where the innermost axes do not fit: whole atoms are matched from the front, the rest is fixed."""
        left, result = list(self.flat(axis)), list[Axis]()
        for at, wanted in enumerate(sizes):
            taken, size = [], wanted
            while size != ONE and left and (rest := size.over(self._sizes[left[0]])):
                taken.append(left.pop(0))
                size = rest
            if size != ONE:
                self.fix((*taken, *left), why)
                return result + [self.new(each, why) for each in sizes[at:]]
            result.append(tuple(taken))
        self.fix(tuple(left), why)
        return result

    def cut(self, axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
        """Consecutive parts of an axis, of these sizes (rule 1); none is empty and they add up to the axis."""
        if len(sizes) == 1:
            return [axis]
        axis = self.flat(axis)
        inner = self.size(axis[1:])
        if not self.size(axis).static or any(size % inner.count for size in sizes):
            self.fix(axis, why)
            return [self.new(Size(size), why) for size in sizes]
        pieces = self._cut_atom(axis[0], [size // inner.count for size in sizes], why)
        return [piece + axis[1:] for piece in pieces]

    def join(self, parts: Sequence[Axis], size: Size) -> Axis:
        """The axis of consecutive parts, whose sizes add up to `size`."""
        if len(parts) == 1:
            return parts[0]
        axis = self.new(size)
        self._parts[axis[0]] = tuple(parts)
        return axis

    def _root(self, atom: Atom) -> Atom:
        while self._parent[atom] != atom:
            self._parent[atom] = atom = self._parent[self._parent[atom]]
        return atom

    def _merge(self, a: Atom, b: Atom, why: str) -> None:
        """Make one class of two different classes of equal size, neither of them a product."""
        if a == b:
            return
        for reason in (self._why[a], self._why[b]):
            if reason is not None:
                self.fix((a, b), reason)
        mine, theirs = self._parts.get(a, ()), self._parts.pop(b, ())
        self._parent[b] = a
        if theirs and not mine:
            self._parts[a] = theirs
        elif mine and theirs:
            self._merge_sums(a, mine, theirs, why)

    def _merge_sums(self, a: Atom, mine: tuple[Axis, ...], theirs: tuple[Axis, ...], why: str) -> None:
        sizes = [self.size(part) for part in theirs]
        if sizes == [self.size(part) for part in mine]:
            groups = [[part] for part in mine]
        elif self._sizes[a].static:
            groups = self._refine(mine, [size.count for size in sizes], why)
        else:
            for part in (*mine, *theirs):
                self.fix(part, why)
            return
        self._parts[a] = tuple(piece for group in groups for piece in group)
        for group, part, size in zip(groups, theirs, sizes, strict=True):
            self.unite(self.join(group, size), part, why)

    def _split(self, atom: Atom, inner_size: Size, why: str) -> None:
        """Make a whole atom or a sum a product whose inner factor has this size."""
        outer_size, fixed = self._sizes[atom].over(inner_size), self._why[atom]
        assert outer_size is not None
        parts = self._parts.pop(atom, ())
        outers = [self.size(part).over(inner_size) for part in parts]
        if None in outers or (parts and not self._sizes[atom].static):
            for part in parts:
                self.fix(part, why)
            parts, fixed = (), fixed or why
        inner = self.new(inner_size, fixed)
        if not parts:
            self._factors[atom] = self.new(outer_size, fixed) + inner
            return
        made = [self.new(size, fixed) for size in outers if size is not None]
        outer = self.join(made, outer_size)
        self._factors[atom] = outer + inner
        for part, piece in zip(parts, made, strict=True):
            self.unite(part, piece + inner, why)

    def _cut_atom(self, atom: Atom, sizes: list[int], why: str) -> list[Axis]:
        parts = self._parts.get(atom)
        if parts is None:
            made = [self.new(Size(size), self._why[atom]) for size in sizes]
            self._parts[atom] = tuple(made)
            return made
        groups = self._refine(parts, sizes, why)
        self._parts[atom] = tuple(piece for group in groups for piece in group)
        return [self.join(group, Size(size)) for group, size in zip(groups, sizes, strict=True)]

    def _refine(self, parts: Sequence[Axis], sizes: list[int], why: str) -> list[list[Axis]]:
        """Cut `parts` so that consecutive runs of them have these sizes; returns the runs."""
        queue, groups = list(parts)[::-1], []
        for wanted in sizes:
            group: list[Axis] = []
            while wanted:
                part = queue.pop()
                found = self.size(self.flat(part)).count
                if found > wanted:
                    part, rest = self.cut(part, [wanted, found - wanted], why)
                    queue.append(rest)
                    found = wanted
                group.append(part)
                wanted -= found
            groups.append(group)
        return groups
