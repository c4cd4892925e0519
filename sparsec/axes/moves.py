"""Fold a permutation of channels into a program's parameters (see `axes` for which permutations there are)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.axes.analysis import Move, Variable
from sparsec.axes.atoms import Atom
from sparsec.axes.structure import Leaf, Structure, Sum, length
from sparsec.errors import GraphError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program


def apply(program: Program, variable: Variable, permutation: Tensor) -> Program:
    """Fold a permutation into a copy of the program: what stood at `permutation[..., i]` then stands at `i`.

    permutation: integers of shape `variable.shape`, each row an order of 0 .. size - 1. Raises UsageError for anything
    else, and when a moved weight has a selection or a mask: patterns are chosen after permuting, not before.
    """
    import torch

    if permutation.shape != variable.shape or permutation.is_floating_point():
        raise UsageError(
            f"{variable.name}: expected whole numbers of shape {variable.shape}, "
            f"found {permutation.dtype} of shape {tuple(permutation.shape)}"
        )
    permutation = permutation.detach().cpu().long()
    if not torch.equal(permutation.sort(-1).values, torch.arange(variable.size).expand(variable.shape)):
        raise UsageError(f"{variable.name}: each row must hold every number from 0 to {variable.size - 1} once")
    for move in variable.moves:
        sizes = tuple(map(length, move.structures))
        if (
            not _fx.has_tensor(program.module, move.tensor)
            or _fx.get_tensor(program.module, move.tensor).shape != sizes
        ):
            raise UsageError(
                f"{variable.name} moves {move.tensor} of shape {sizes}, which this program has not: it is not the "
                "program that was analysed; analyse it again"
            )
    moved = {move.tensor for move in variable.moves}
    for site in program.sites:
        if site.name in moved and (site.selection is not None or site.mask is not None):
            raise UsageError(f"{variable.name} moves {site.name}, whose pattern is already chosen; permute before that")
    program = program.clone()
    fold(program, variable, permutation)
    return program


def fold(program: Program, variable: Variable, permutation: Tensor) -> None:
    """`apply` to the program itself, whose tensors are replaced; nothing is checked."""
    from torch import nn

    permutation = permutation.long()
    for move in variable.moves:
        old = _fx.get_tensor(program.module, move.tensor)
        new = old.detach()[_index(move, variable, permutation)].contiguous()
        _fx.set_tensor(
            program.module, move.tensor, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        )


def numbered(move: Move, variable: Variable, dim: int) -> Tensor | None:
    """Which thing of which context each element along a dimension is: context * size + thing, -1 for none.

    Broadcasts to the tensor's shape; contexts are counted through `variable.per`, the last fastest. None where an
    element has two things of the variable (an axis that is the product of an atom with itself).
    """
    import torch

    rank, digits = len(move.structures), [list(_digits(structure)) for structure in move.structures]
    result = _along(torch.full((length(move.structures[dim]),), -1), dim, rank)
    for atom, value, _ in digits[dim]:
        if atom != variable.atom:
            continue
        present, context = value >= 0, torch.zeros((1,) * rank, dtype=torch.int64)
        for leaf in variable.per:
            context = context * leaf.size + _companion(leaf.atom, digits, dim, present)
        here = _along(present, dim, rank)
        if bool((here & (result >= 0)).any()):
            return None
        result = torch.where(here, context * variable.size + _along(value, dim, rank), result)
    return result


def _index(move: Move, variable: Variable, permutation: Tensor) -> tuple[Tensor, ...]:
    """For each dimension of a tensor, which of its positions every element comes from; the tensors broadcast."""
    import torch

    rank, index = len(move.structures), []
    digits = [list(_digits(structure)) for structure in move.structures]
    for dim, structure in enumerate(move.structures):
        position = _along(torch.arange(length(structure)), dim, rank)
        moved = position
        for atom, value, stride in digits[dim]:
            if atom == variable.atom:
                present = value >= 0
                where = [_companion(leaf.atom, digits, dim, present) for leaf in variable.per]
                old = _along(value.clamp(min=0), dim, rank)
                new = permutation[(*where, old)]
                moved = moved + torch.where(_along(present, dim, rank), (new - old) * stride, 0)
        index.append(moved)
    return tuple(index)


def _companion(atom: Atom, digits: list[list[_Digit]], dim: int, present: Tensor) -> Tensor:
    """The value of an atom beside the positions `present` of dimension `dim`: on that dimension, or on another."""
    rank = len(digits)
    for other in [dim, *range(rank)]:
        for found, value, _ in digits[other]:
            if found == atom and (other != dim or bool((value[present] >= 0).all())):
                return _along(value.clamp(min=0), other, rank)
    raise GraphError(f"atom {atom} does not accompany dimension {dim}")


_Digit = tuple[Atom, "Tensor", int]


def _digits(structure: Structure) -> Iterator[_Digit]:
    """Each place of an atom on an axis: the atom, its value at every position (-1: not there), and its stride."""
    import torch

    if isinstance(structure, Leaf):
        yield structure.atom, torch.arange(structure.size), 1
        return
    before, total = 0, length(structure)
    if isinstance(structure, Sum):
        for part in structure.parts:
            here = length(part)
            for atom, value, stride in _digits(part):
                absent = torch.full((total,), -1)
                absent[before : before + here] = value
                yield atom, absent, stride
            before += here
        return
    inner = total
    for factor in structure.factors:
        here = length(factor)
        inner //= here
        for atom, value, stride in _digits(factor):
            yield atom, value.repeat_interleave(inner).repeat(total // (inner * here)), stride * inner


def _along(values: Tensor, dim: int, rank: int) -> Tensor:
    """A vector as a tensor of `rank` dimensions that varies along `dim`."""
    return values.view(*(-1 if i == dim else 1 for i in range(rank)))
