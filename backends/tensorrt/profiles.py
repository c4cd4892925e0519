"""Which sizes an engine is built for: smallest, usual and largest, of every dynamic size of a program.

TensorRT takes no other sizes than these at run time, and chooses its kernels for the usual ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.errors import RecipeError

if TYPE_CHECKING:
    from sparsec.program import Program

LARGEST = 64  # of a size that the model does not limit: a batch
Shapes = tuple[list[int], list[int], list[int]]
"""Smallest, usual and largest shape of an input."""
_EXPECTED = 'expected smallest:usual:largest for each size, such as sizes="batch=1:8:32 length=1:128:512"'


@dataclass(frozen=True)
class Range:
    """Sizes from 1 up, ascending."""

    smallest: int
    usual: int
    largest: int


def read(text: str) -> dict[str, Range]:
    """Sizes by name; raises RecipeError where one cannot be, so that no build starts.

    >>> read("batch=1:8:32 length=128")
    {'batch': Range(smallest=1, usual=8, largest=32), 'length': Range(smallest=128, usual=128, largest=128)}
    """
    found: dict[str, Range] = {}
    for part in re.split(r"[\s,]+", text.strip()) if text.strip() else []:
        match = re.fullmatch(r"(\w+)=(\d{1,9})(?::(\d{1,9}):(\d{1,9}))?", part)
        if not match:
            raise RecipeError(f"backend tensorrt: sizes: cannot read {part!r}; {_EXPECTED}")
        name, low = match[1], int(match[2])
        usual, high = int(match[3] or low), int(match[4] or low)
        if not 1 <= low <= usual <= high:
            raise RecipeError(f"backend tensorrt: sizes: found {part}, which does not ascend from 1 up; {_EXPECTED}")
        if name in found:
            raise RecipeError(f"backend tensorrt: sizes: {name} is given twice")
        found[name] = Range(low, usual, high)
    return found


def misfit(asked: Mapping[str, Range], program: Program) -> str | None:
    """Why the asked sizes do not fit the program, or None."""
    for name, range_ in asked.items():
        if name not in program.dims:
            return f"sizes names {name!r}; the model's dynamic sizes are {', '.join(program.dims) or 'none'}"
        low, high = program.dims[name]
        if range_.smallest < low or (high is not None and range_.largest > high):
            limit = f"{low} to {high}" if high is not None else f"at least {low}"
            return (
                f"sizes asks for a {name} of {range_.smallest} to {range_.largest}, and the model takes {limit}; "
                f'write sizes="{name}={low}:{range_.usual}:{high or range_.largest}"'
            )
    return None


def ranges(asked: Mapping[str, Range], program: Program) -> dict[str, Range]:
    """The sizes of every dynamic size: as asked, else from the model's limits, the usual one as in its example."""
    example = {
        size: program.inputs[name].shape[axis]
        for name, axes in axes_of(program).items()
        for axis, size in enumerate(axes)
        if size in program.dims
    }
    found = {}
    for name, (low, high) in program.dims.items():
        largest = high if high is not None else max(low, LARGEST)
        found[name] = asked.get(name) or Range(low, min(max(low, example.get(name, low)), largest), largest)
    return found


def shapes(chosen: Mapping[str, Range], program: Program) -> dict[str, Shapes]:
    """Smallest, usual and largest shape of each input that has a dynamic size."""
    found: dict[str, Shapes] = {}
    for name, axes in axes_of(program).items():
        if not set(axes) & set(chosen):
            continue
        sizes = [chosen.get(size) or Range(*[program.inputs[name].shape[axis]] * 3) for axis, size in enumerate(axes)]
        found[name] = ([s.smallest for s in sizes], [s.usual for s in sizes], [s.largest for s in sizes])
    return found


def axes_of(program: Program) -> dict[str, list[str]]:
    """Sizes of every input, from its type: `int64[batch, length]` -> [batch, length]."""
    types = [node.meta[_fx.TYPE] for node in program.module.graph.find_nodes(op="placeholder")]
    sizes = [kind.partition("[")[2].rstrip("]").split(", ") for kind in types]
    return {name: [size for size in axes if size] for name, axes in zip(program.inputs, sizes, strict=True)}
