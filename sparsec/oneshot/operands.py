"""What a layer multiplies its weight with, as (tokens, cols) matrices, for every kind of site.

For all uses of a site: y = x W^T with W one of its (batch, rows, cols) matrices, x as given here, up to a reshape.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.uses import ON_TRAIL, operation

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node

    from sparsec.sites import Site


def input_of(node: Node, site: Site) -> Node:
    """The node that gives the activations of a use."""
    name = operation(node)
    operands: Any = node.args
    if name == "einsum":
        source: Node = next(operand for operand in operands[1] if not _from_weight(operand, site))
        return source
    found: Node = operands[1 if name in ("addmm", "baddbmm") or _on_the_left(node, site) else 0]
    return found


def _on_the_left(node: Node, site: Site) -> bool:
    """Whether a use is W x: its activations have the columns second to last. A stacked weight may have both uses."""
    return operation(node) in ("matmul", "mm") and _from_weight(node.args[0], site)


def items_of(module: GraphModule, node: Node, site: Site) -> list[int]:
    """Which of a site's matrices a use reads: all, or the parts that a split gives it."""
    import torch

    batch, rows, cols = site.shape
    if batch == 1 or site.kind in ("experts", "conv1d", "conv2d"):
        return list(range(batch))
    # The trail from the parameter to its use is run on the numbers of the parameter's elements.
    numbers = torch.arange(batch * rows * cols).view(site.view.parameter)
    operand = next(operand for operand in _fx.find(module, node.name).all_input_nodes if _from_weight(operand, site))
    read = _trail(operand, site, numbers)
    return sorted({int(i) for i in (read.flatten() // (rows * cols)).unique()})


def _trail(value: Any, site: Site, numbers: Tensor) -> Any:
    from torch.fx import Node, map_arg

    if value.op == "get_attr":
        return numbers if value.target == site.name else None
    if operation(value) in ("where", "to", "_to_copy", "dropout", "type_as"):  # they change no place
        return _trail(next(operand for operand in value.all_input_nodes if _from_weight(operand, site)), site, numbers)
    assert isinstance(value, Node)
    return value.target(*map_arg(value.args, lambda operand: _trail(operand, site, numbers)))  # type: ignore[operator]


def _from_weight(node: Any, site: Site) -> bool:
    """Whether a value is the parameter itself, at the end of a trail that `uses` follows."""
    if node.op == "get_attr":
        return bool(node.target == site.name)
    return operation(node) in ON_TRAIL and any(_from_weight(operand, site) for operand in node.all_input_nodes)


def matrices(node: Node, site: Site, arguments: tuple[Any, ...], x: Any, items: list[int]) -> Iterator[tuple[int, Any]]:
    """(item, x of shape (tokens, cols)) of each of the matrices `items` that a call reads.

    `arguments`: of the call, weights included; `x`: the value of `input_of`.
    """
    cols = site.shape[2]
    if site.view.experts:
        yield from _experts(node, arguments, x, items)
    elif operation(node) in ("conv1d", "conv2d"):
        patches = _patches(node, site, arguments, x)
        for item in items:
            yield item, patches[item]
    else:
        if _on_the_left(node, site):
            x = x.transpose(-1, -2) if x.dim() > 1 else x
        elif operation(node) == "einsum":
            x = _columns_last(node, site, x)
        for item in items:
            yield item, x.reshape(-1, cols)


def _experts(node: Node, arguments: tuple[Any, ...], x: Tensor, items: list[int]) -> Iterator[tuple[int, Tensor]]:
    if operation(node) != "expert_linear":
        for item in items:
            own = x if x.dim() < 3 else x.select(-3, item if x.shape[-3] > 1 else 0)
            yield item, own.reshape(-1, x.shape[-1])
        return
    ends = [0, *arguments[1].tolist()]
    for item in items:
        yield item, x[ends[item] : ends[item + 1]]


def _columns_last(node: Node, site: Site, x: Tensor) -> Tensor:
    """The operand of an einsum with the summed letters last, in the order of the weight's columns."""
    operands: Any = node.args[1]
    letters = str(node.args[0]).replace(" ", "").partition("->")[0].split(",")
    own = next(i for i, operand in enumerate(operands) if _from_weight(operand, site))
    mine, other = letters[own], letters[1 - own]
    output = str(node.args[0]).partition("->")[2]
    # The weight's letters stand in the order of its operand, its view's axes in that of the parameter.
    order = {letter: i for i, letter in enumerate(mine)}
    summed = sorted((letter for letter in mine if letter not in output), key=order.__getitem__)
    kept = [letter for letter in other if letter not in summed]
    return x.permute([other.index(letter) for letter in kept + summed])


def _patches(node: Node, site: Site, arguments: tuple[Any, ...], x: Tensor) -> Tensor:
    """(groups, tokens, cols) patches that a convolution multiplies with each filter."""
    import torch

    one = site.kind == "conv1d"
    kernel = tuple(site.view.parameter[2:])
    defaults: list[Any] = [None, None, None, 1, 0, 1, 1]
    stride, padding, dilation = ([*arguments, *defaults[len(arguments) :]])[3:6]
    if one:
        x, kernel = x.unsqueeze(-2), (1, *kernel)
    stride, dilation = _pair(stride, one, 1), _pair(dilation, one, 1)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        left, right = [t // 2 for t in total], [t - t // 2 for t in total]
        x = torch.nn.functional.pad(x, (left[1], right[1], left[0], right[0]))
    shift = (0, 0) if isinstance(padding, str) else _pair(padding, one, 0)
    columns = torch.nn.functional.unfold(x, kernel, dilation, shift, stride)  # (n, channels * kh * kw, places)
    patches: Tensor = columns.unflatten(1, (site.shape[0], -1)).permute(1, 0, 3, 2).flatten(1, 2)
    return patches


def _pair(value: Any, one: bool, along: int) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * (1 if one else 2) if len(values) == 1 else values
    return (along, values[0]) if one else (values[0], values[1])
