"""A parameter of any shape seen as matrices: (batch, rows, cols), cols being the axis that the layer sums over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightView:
    """How a parameter is seen: its axes are put in the order `axes`, then grouped to (batch, rows, cols).

        layer                       parameter              axes          groups of axes
        linear                      (out, in)              (0, 1)        1, out, in
        Conv1D of GPT-2 (addmm)     (in, out)              (1, 0)        1, out, in
        convolution                 (out, in/g, kh, kw)    (0, 1, 2, 3)  g, out/g, in/g * kh * kw
        experts                     (experts, in, out)     (0, 2, 1)     experts, out, in
        stacked q, k, v             (3 * out, in)          (0, 1)        3, out, in
        einsum ibh,hnd->ibnd        (in, heads, size)      (1, 2, 0)     1, heads * size, in

    >>> WeightView((1, 0), (768, 2304)).shape
    (1, 2304, 768)
    """

    axes: tuple[int, ...]
    parameter: tuple[int, ...]
    """The parameter's own shape."""
    batch: int = 1
    """Into how many matrices the first axis is cut: groups of a convolution, stacked q, k and v."""
    experts: bool = False
    """Whether the first axis counts matrices."""
    row_axes: int = 1
    """How many of the axes make up the rows; more than one where an einsum keeps (heads, head size) apart."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(batch, rows, cols)."""
        sizes = [self.parameter[axis] for axis in self.axes]
        if self.experts:
            return sizes[0], sizes[1], sizes[2]
        rows = math.prod(sizes[: self.row_axes])
        return self.batch, rows // self.batch, math.prod(sizes[self.row_axes :])

    def to_matrices(self, parameter: Tensor) -> Tensor:
        """(batch, rows, cols) of a parameter; shares its memory where it can."""
        return parameter.permute(self.axes).reshape(self.shape)

    def to_parameter(self, matrices: Tensor) -> Tensor:
        """The inverse of `to_matrices`, contiguous."""
        back = [self.axes.index(axis) for axis in range(len(self.axes))]
        return matrices.reshape([self.parameter[axis] for axis in self.axes]).permute(back).contiguous()
