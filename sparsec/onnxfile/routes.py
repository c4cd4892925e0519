"""How a stored tensor becomes the operand of a product, and how a mask of the operand's matrices comes back.

1. Transpose, Reshape, Squeeze and Unsqueeze move values, Identity and Cast (to a floating-point type) leave them.
2. DequantizeLinear with constant scale and zero point gives (stored - zero) * scale; a weight is pruned by storing the
   zero point of its place, whatever the zero points are: of the tensor, of a channel, of a block.
3. QuantizeLinear, then DequantizeLinear with the same scale and zero point, round but keep what is 0.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsec.onnxfile.opened import OnnxFile
from sparsec.onnxfile.scopes import Reader, attribute

if TYPE_CHECKING:
    from torch import Tensor

_FLOATS = (1, 10, 11, 16)  # TensorProto's FLOAT, FLOAT16, DOUBLE, BFLOAT16


@dataclass(frozen=True)
class Step:
    """A permutation of axes, or, without one, a reshape."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    axes: tuple[int, ...] | None = None

    def forth(self, tensor: Tensor) -> Tensor:
        """What the step makes of a tensor of shape `before`."""
        return tensor.reshape(self.after) if self.axes is None else tensor.permute(self.axes)

    def back(self, tensor: Tensor) -> Tensor:
        """The inverse."""
        if self.axes is None:
            return tensor.reshape(self.before)
        return tensor.permute([self.axes.index(axis) for axis in range(len(self.axes))])


@dataclass(frozen=True)
class Quantized:
    """Scale and zero point of a DequantizeLinear, of which the names are compared (rule 2)."""

    names: tuple[str, str]
    axis: int
    block: int
    steps_before: int
    scale: Any = field(compare=False)
    zero: Any = field(compare=False)

    def spread(self, values: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales or zero points as a tensor that broadcasts to `shape`, that of DequantizeLinear's input."""
        if values.numel() == 1:
            return values.reshape([1] * len(shape))
        if self.block:
            return values.repeat_interleave(self.block, self.axis).narrow(self.axis, 0, shape[self.axis])
        return values.reshape([-1 if axis == self.axis % len(shape) else 1 for axis in range(len(shape))])


@dataclass(frozen=True)
class Route:
    """The way of a stored tensor of shape `stored` to where it has been followed."""

    stored: tuple[int, ...]
    steps: tuple[Step, ...] = ()
    quantized: Quantized | None = None
    rounding: tuple[str, ...] = ()
    """Scale and zero point between QuantizeLinear and DequantizeLinear (rule 3)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that it has there."""
        return self.steps[-1].after if self.steps else self.stored

    def moved(self, after: tuple[int, ...], axes: tuple[int, ...] | None = None) -> Route:
        """One step further."""
        return dataclasses.replace(self, steps=(*self.steps, Step(self.shape, after, axes)))

    def operand(self, file: OnnxFile, tensor: Any) -> Tensor:
        """The operand's values, as float32 where it was quantized."""
        value, ways = file.tensor(tensor), self.quantized
        for count in range(len(self.steps) + 1):
            if ways and ways.steps_before == count:
                shape = tuple(value.shape)
                scale = ways.spread(file.tensor(ways.scale).float(), shape)
                zero = 0 if ways.zero is None else ways.spread(file.tensor(ways.zero).float(), shape)
                value = (value.float() - zero) * scale
            if count < len(self.steps):
                value = self.steps[count].forth(value)
        return value

    def pruned(self, file: OnnxFile, tensor: Any, mask: Tensor) -> Tensor:
        """The stored values, with 0 (or the zero point) where the operand's mask is false."""
        import torch

        value = file.tensor(tensor)
        for step in reversed(self.steps):
            mask = step.back(mask)
        ways = self.quantized
        if ways is None or ways.zero is None:
            return torch.where(mask, value, torch.zeros((), dtype=value.dtype))
        zero = file.tensor(ways.zero)
        before = self.steps[: ways.steps_before]
        shape = before[-1].after if before else self.stored
        zeros = ways.spread(zero, shape).expand(shape)
        for step in reversed(before):
            zeros = step.back(zeros)
        return torch.where(mask, value, zeros)


def further(file: OnnxFile, route: Route, reader: Reader) -> Route | None:
    """The route through a node that only moves, casts or dequantizes what it reads, or None."""
    node, index, scope = reader
    if node.domain or index or len(node.output) != 1:
        return None
    if route.rounding and node.op_type != "DequantizeLinear":
        return None
    if node.op_type == "Identity" or (node.op_type == "Cast" and _between_floats(route, reader)):
        return route
    if node.op_type == "Transpose":
        axes = tuple(attribute(node, "perm", range(len(route.shape))[::-1]))
        return route.moved(tuple(route.shape[axis] for axis in axes), axes)
    if node.op_type in ("Reshape", "Squeeze", "Unsqueeze"):
        after = _reshaped(file, route.shape, reader)
        return route.moved(after) if after is not None else None
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        names = (*node.input[1:3], "")[:2]
        constants = [scope.constant(name) if name else None for name in names]
        if constants[0] is None or (names[1] and constants[1] is None):
            return None
        return _through(route, node, names, constants)
    return None


def _through(route: Route, node: Any, names: tuple[str, ...], constants: list[Any]) -> Route | None:
    """Through QuantizeLinear or DequantizeLinear; None where the two do not belong together."""
    if node.op_type == "QuantizeLinear":
        return None if route.quantized or route.rounding else dataclasses.replace(route, rounding=names)
    if route.rounding:
        return dataclasses.replace(route, rounding=()) if route.rounding == names else None
    if route.quantized:
        return None
    axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
    found = Quantized((names[0], names[1]), axis, block, len(route.steps), *constants)
    return dataclasses.replace(route, quantized=found)


def _between_floats(route: Route, reader: Reader) -> bool:
    """A stored integer that is cast, not dequantized, is scaled by what follows: nothing that rule 2 could invert."""
    stored = reader.scope.constant(reader.node.input[0])
    integer = stored is not None and stored.data_type not in _FLOATS
    return attribute(reader.node, "to") in _FLOATS and not integer


def _reshaped(file: OnnxFile, shape: tuple[int, ...], reader: Reader) -> tuple[int, ...] | None:
    """The static shape that Reshape, Squeeze or Unsqueeze gives, or None."""
    node, _, scope = reader
    constant = scope.constant(node.input[1]) if len(node.input) > 1 else None
    if len(node.input) > 1 and constant is None:
        return None
    numbers = file.array(constant).flatten().tolist() if constant is not None else None
    if node.op_type == "Reshape":
        if numbers is None:
            numbers = attribute(node, "shape")
        return _wanted(shape, list(numbers), bool(attribute(node, "allowzero", 0))) if numbers is not None else None
    axes = attribute(node, "axes") if numbers is None else numbers
    if node.op_type == "Squeeze":
        places = [i for i, size in enumerate(shape) if size == 1] if axes is None else [a % len(shape) for a in axes]
        return tuple(size for i, size in enumerate(shape) if i not in places)
    if axes is None:
        return None
    rank, rest = len(shape) + len(axes), iter(shape)
    places = [axis % rank for axis in axes]
    return tuple(1 if i in places else next(rest) for i in range(rank))


def _wanted(shape: tuple[int, ...], sizes: list[int], zero_is_size: bool) -> tuple[int, ...] | None:
    if not zero_is_size:
        sizes = [shape[i] if size == 0 and i < len(shape) else size for i, size in enumerate(sizes)]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [math.prod(shape) // max(known, 1) if size == -1 else size for size in sizes]
    return tuple(sizes) if math.prod(sizes) == math.prod(shape) else None
