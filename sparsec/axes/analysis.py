"""Channel axes: which permutations of a program's parameters leave its outputs as they are.

Hidden channels, heads and the channels inside a head may be renumbered, if every parameter that meets them follows.
`analyse` finds these freedoms from the graph alone; `moves.apply` folds a chosen permutation into the parameters.

1. Every tensor axis is a product of atoms (`atoms`); each operator's rule (`rules`) unites and fixes them.
2. Inputs, outputs and constants are fixed; of the buffers only batch norm's statistics may move.
3. An atom that is not fixed and lies on a parameter is a variable. Its permutation may differ along another axis that
   accompanies it in every tensor: a head's own permutation, where heads are never brought together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Literal

from sparsec import _fx
from sparsec.axes.atoms import Atom, Atoms
from sparsec.axes.calls import Call, Dims, Flow, Result, call_of, operator_name, shapes_of, unknown
from sparsec.axes.rules import rule_of
from sparsec.axes.sizes import Size
from sparsec.axes.stacks import stacked
from sparsec.axes.structure import Leaf, Product, Structure, leaves, places, structure_of

if TYPE_CHECKING:
    from torch.fx import Node

    from sparsec.program import Program
    from sparsec.sites import Site

Kind = Literal["free", "within", "order"]


@dataclass(frozen=True)
class Move:
    """A tensor that a variable permutes, along each dimension in whose structure the variable's atom lies."""

    tensor: str
    dims: tuple[int, ...]
    structures: tuple[Structure, ...]
    """Of all dimensions of the tensor."""


@dataclass(frozen=True)
class Variable:
    """A freedom: `size` things that may be put in any order, if all `moves` follow."""

    name: str
    """The first parameter and dimension it moves, such as `encoder.0.up.weight:0`; unique."""
    atom: Atom
    size: int
    kind: Kind
    """`free`: single channels. `within`: channels inside a head or group. `order`: whole heads or groups."""
    per: tuple[Leaf, ...]
    """Axes along which the permutation may differ, outermost first; empty: the same everywhere."""
    moves: tuple[Move, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a permutation: one row of `size` numbers for each position along `per`."""
        return (*(leaf.size for leaf in self.per), self.size)


@dataclass(frozen=True)
class Axes:
    """The result of `analyse`."""

    variables: tuple[Variable, ...]
    structures: Mapping[str, tuple[Structure, ...]]
    """Of every parameter's and buffer's dimensions, by tensor name."""
    fixed: Mapping[Atom, str]
    """Why the atoms in `structures` that are no variables may not be permuted."""

    def variable(self, atom: Atom) -> Variable | None:
        """The variable that permutes an atom, or None when it is fixed."""
        return next((variable for variable in self.variables if variable.atom == atom), None)

    def rows(self, site: Site) -> Structure:
        """How a site's rows are made of atoms; experts and stacked matrices are counted first."""
        return self._joined(site, site.view.axes[: self._first_column(site)])

    def columns(self, site: Site) -> Structure:
        """How a site's columns, the axis that its pattern runs along, are made of atoms."""
        return self._joined(site, site.view.axes[self._first_column(site) :])

    def _joined(self, site: Site, dims: Sequence[int]) -> Structure:
        found = [self.structures[site.name][dim] for dim in dims]
        return found[0] if len(found) == 1 else Product(tuple(found))

    @staticmethod
    def _first_column(site: Site) -> int:
        return 2 if site.view.experts else 1


def analyse(program: Program) -> Axes:
    """Find every variable of a program. Nothing is changed; time is near linear in the size of the graph."""
    flow, tensors = _propagate(program)
    structures = {name: tuple(structure_of(flow.atoms, axis) for axis in dims) for name, dims in tensors.items()}
    fixed: dict[Atom, str] = {}
    moves: dict[Leaf, list[Move]] = {}
    for name, dims in structures.items():
        found = [set(leaves(structure)) for structure in dims]
        for leaf in dict.fromkeys(leaf for structure in dims for leaf in leaves(structure)):
            if (why := flow.atoms.why(leaf.atom)) is not None:
                fixed[leaf.atom] = why
                continue
            along = tuple(dim for dim, inside in enumerate(found) if leaf in inside)
            moves.setdefault(leaf, []).append(Move(name, along, dims))
    contexts = _contexts(flow)
    names = Counter[str]()
    variables = []
    for leaf, moved in moves.items():
        name = f"{moved[0].tensor}:{moved[0].dims[0]}"
        names[name] += 1
        name = name if names[name] == 1 else f"{name}/{names[name]}"
        per = tuple(Leaf(atom, flow.atoms.size((atom,)).count) for atom in sorted(contexts.get(leaf.atom, ())))
        variables.append(Variable(name, leaf.atom, leaf.size, _kind(leaf.atom, moved, per), per, tuple(moved)))
    return Axes(tuple(variables), structures, fixed)


def _propagate(program: Program) -> tuple[Flow, dict[str, Dims]]:
    """The axes of every node, and of every tensor of the module."""
    flow, tensors = Flow(), _Tensors(program)
    for node in program.module.graph.nodes:
        if node.op == "placeholder":
            _record(flow, node, tuple(flow.atoms.new(size, f"input {node.target}") for size in shapes_of(node)[0]))
        elif node.op == "get_attr":
            _record(flow, node, tensors.read(flow.atoms, str(node.target)))
        elif node.op == "output":
            for key, value in node.args[0].items():
                for dims in _each(flow.dims[value]):
                    for axis in dims:
                        flow.atoms.fix(axis, f"output {key}")
        elif node.target is getitem and isinstance(flow.dims.get(node.args[0]), list):
            _record(flow, node, flow.dims[node.args[0]][node.args[1]])
        elif operator_name(node) != "sym_size.int":
            call = call_of(flow, node)
            if not stacked(flow, node, call):
                _record(flow, node, _checked(call, rule_of(node)(call)))
    return flow, tensors.dims


class _Tensors:
    """The axes of parameters and buffers, made at the first reading (rule 2)."""

    def __init__(self, program: Program) -> None:
        self.dims: dict[str, Dims] = {}
        self._module = program.module
        self._first: dict[int, str] = {}
        self._users: dict[int, set[str]] = {}
        for node in program.module.graph.nodes:
            if node.op == "get_attr":
                tensor = _fx.get_tensor(program.module, str(node.target))
                self._users.setdefault(id(tensor), set()).update(map(operator_name, node.users))

    def read(self, atoms: Atoms, name: str) -> Dims:
        """The axes of a tensor; the same object under two names has the same axes."""
        from torch import nn

        if name in self.dims:
            return self.dims[name]
        tensor = _fx.get_tensor(self._module, name)
        first = self._first.setdefault(id(tensor), name)
        if first != name:
            self.dims[name] = self.dims[first]
            return self.dims[name]
        movable = isinstance(tensor, nn.Parameter) or self._users[id(tensor)] == {"batch_norm.default"}
        why = None if movable else f"constant {name}"
        self.dims[name] = tuple(atoms.new(Size(size), why) for size in tensor.shape)
        return self.dims[name]


def _each(result: Result) -> list[Dims]:
    return [result] if isinstance(result, tuple) else result


def _record(flow: Flow, node: Node, result: Result) -> None:
    """A node without tensors (a size) has no axes."""
    if found := _each(result):
        flow.dims[node] = result
        flow.scopes.extend(found)


def _checked(call: Call, result: Result) -> Result:
    """The result of a rule; where its sizes are not the node's, the rule is not believed."""
    atoms, found = call.atoms, _each(result)
    if [len(dims) for dims in found] != [len(shape) for shape in call.shapes]:
        return unknown(call)
    for dims, shape in zip(found, call.shapes, strict=True):
        for axis, size in zip(dims, shape, strict=True):
            if atoms.size(axis) != size:
                return unknown(call)
    return result


def _contexts(flow: Flow) -> dict[Atom, set[Atom]]:
    """For each free atom, the atoms along which its permutation may differ (rule 3).

    An atom is accompanied by another where both index one element and the other does so exactly once; it must be so in
    every scope that holds the atom.
    """
    atoms = flow.atoms
    found: dict[Atom, set[Atom]] = {}
    inside: dict[Atom, set[Atom]] = {}

    def members(axes: Dims) -> set[Atom]:
        """All atoms in sums."""
        result: set[Atom] = set()
        for axis in axes:
            for atom in atoms.flat(axis):
                if parts := atoms.parts(atom):
                    if atom not in inside:
                        inside[atom] = members(parts) | {a for part in parts for a in atoms.flat(part)}
                    result |= inside[atom]
        return result

    def visit(axes: Dims, around: list[Atom], elsewhere: set[Atom]) -> None:
        flat = [atom for axis in axes for atom in atoms.flat(axis)]
        sums = [atom for atom in flat if atoms.parts(atom)]
        whole = around + [atom for atom in flat if not atoms.parts(atom)]
        count = Counter(whole)
        hidden = elsewhere | members(tuple((atom,) for atom in sums))
        companions = {atom for atom in whole if count[atom] == 1 and atom not in hidden}
        for atom in flat:
            if not atoms.parts(atom) and atoms.why(atom) is None:
                found[atom] = found.get(atom, companions) & companions - {atom}
        for i, atom in enumerate(sums):
            others = elsewhere | members(tuple((other,) for j, other in enumerate(sums) if j != i))
            for part in atoms.parts(atom):
                visit((part,), whole, others)

    for scope in dict.fromkeys(tuple(atoms.flat(axis) for axis in scope) for scope in flow.scopes):
        visit(scope, [], set())
    return {atom: {other for other in others if atoms.size((other,)).static} for atom, others in found.items()}


def _kind(atom: Atom, moves: Sequence[Move], per: Sequence[Leaf]) -> Kind:
    found = [place for move in moves for structure in move.structures for place in places(structure, atom)]
    if any(inner > 1 for _, inner in found):
        return "order"
    return "within" if per or any(outer > 1 for outer, _ in found) else "free"
