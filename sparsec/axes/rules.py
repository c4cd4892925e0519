"""One rule for each operator: how the axes of its result follow from those of its arguments.

A rule takes a `Call` and returns the axes of the result (a list of them for a list of tensors). To admit an operator,
write a rule or reuse one, and name the operator in the table: as `sum`, or as `max.dim` for one overload. An operator
without a rule fixes everything it touches: it is never taken to be transparent. What a rule must see to:

1. Axes that are paired up or summed over together are united; an axis along which order matters is fixed.
2. An axis whose elements are mixed with each other, even symmetrically (softmax), goes through `Call.mixed`; axes that
   are multiplied out, those summed over included, go through `Call.scope`, and so do the axes of every intermediate
   result. A permutation of one axis may depend on the position along another (each head has its own), but not where
   the operator brings several of those positions together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.axes.calls import Call, Dims, Result, Rule, broadcast, operator_name, positional, unknown
from sparsec.axes.products import PRODUCTS
from sparsec.axes.sizes import Size
from sparsec.axes.views import VIEWS

if TYPE_CHECKING:
    from torch.fx import Node


def rule_of(node: Node) -> Rule:
    """The rule for a node's operator."""
    name = operator_name(node)
    return RULES.get(name) or RULES.get(name.partition(".")[0]) or unknown


# Position by position.


def _elementwise(call: Call) -> Result:
    return broadcast(call, call.tensors())


def _same(call: Call) -> Result:
    """The first argument decides; others give only numbers, types or shapes."""
    return call.tensors()[0]


def _constant(call: Call) -> Result:
    """One value everywhere: any permutation leaves it as it is."""
    return tuple(call.atoms.new(size) for size in call.shape)


def _positions(call: Call) -> Result:
    """arange and the like: the value is the position, whatever tensor only gives a type."""
    return tuple(call.fixed(size) for size in call.shape)


def _prelu(call: Call) -> Result:
    x, (slope,) = call.dims("self"), call.dims("weight")
    if slope:
        call.unite(x[min(1, len(x) - 1)], slope)
    return x


def _triangle(call: Call) -> Result:
    x = call.dims("self")
    call.fix(*x[-2:])
    return x


# Along whole axes.


def _reduce(call: Call) -> Result:
    """Sums, means, maxima ...: the order of what is reduced does not matter."""
    return _reduced(call, call.dims("self"))


def _reduce_both(call: Call) -> Result:
    return [_reduced(call, call.dims("self"))] * 2


def _reduce_ordered(call: Call) -> Result:
    """argmax and the like: the result says where."""
    x = call.dims("self")
    call.fix(*(x[axis] for axis in call.axes("dim", x)))
    result = _reduced(call, x)
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


def _softmax(call: Call) -> Result:
    x = call.dims("self")
    return call.mixed(x, call.axes("dim", x))


def _ordered(call: Call) -> Result:
    """cumsum, sort, roll ...: order matters along `dim` or `dims`."""
    x = call.dims("self")
    result = positional(call, x, call.axes("dims" if "dims" in call.arguments else "dim", x), call.shape)
    return result if len(call.shapes) == 1 else [result] * len(call.shapes)


def _pad(call: Call) -> Result:
    x, widths = call.dims("self"), call.arguments["pad"]
    padded = [len(x) - 1 - i for i in range(len(widths) // 2) if widths[2 * i : 2 * i + 2] != [0, 0]]
    return positional(call, x, padded, call.shape)


def _pool_1d(call: Call) -> Result:
    return positional(call, call.tensors()[0], [len(call.shape) - 1], call.shape)


def _pool_2d(call: Call) -> Result:
    """Pooling and resizing of images: channels are left alone."""
    return positional(call, call.tensors()[0], [len(call.shape) - 2, len(call.shape) - 1], call.shape)


def _reduced(call: Call, x: Dims) -> Dims:
    axes, keep = call.axes("dim", x), bool(call.arguments.get("keepdim"))
    return tuple(() if i in axes else axis for i, axis in enumerate(x) if keep or i not in axes)


# Normalisation.


def _layer_norm(call: Call) -> Result:
    """Also rms_norm: over all of the last axes, each with its own scale."""
    x = call.dims("input")
    first = len(x) - len(call.arguments["normalized_shape"])
    for name in ("weight", "bias"):
        if call.has(name):
            broadcast(call, [x[first:], call.dims(name)])
    return call.mixed(x, range(first, len(x)))


def _group_norm(call: Call) -> Result:
    x = call.dims("input")
    groups = call.arguments["num_groups"]
    inner = call.atoms.size(x[1]).over(Size(groups))
    if inner is None:
        return unknown(call)
    group, member = call.atoms.regroup(x[1], [Size(groups), inner], call.why)
    for name in ("weight", "bias"):
        if call.has(name):
            call.unite(x[1], call.dims(name)[0])
    call.scope(x[0], group)
    return (x[0], group + member, *x[2:])


def _batch_norm(call: Call) -> Result:
    x = call.dims("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        if call.has(name):
            call.unite(x[1], call.dims(name)[0])
    return call.mixed(x, [i for i in range(len(x)) if i != 1])


# Looked up by number.


def _embedding(call: Call) -> Result:
    table, indices = call.dims("weight"), call.dims("indices")
    call.fix(table[0])
    return call.mixed((*indices, *table[1:]), range(len(indices)))


def _gather(call: Call) -> Result:
    x, index = call.dims("self"), call.dims("index")
    if not x:
        return index
    at = call.arguments["dim"] % len(x)
    for i, (axis, other) in enumerate(zip(x, index, strict=True)):
        if i == at or call.atoms.size(axis) != call.atoms.size(other):
            call.fix(axis, other)
        else:
            call.unite(axis, other)
    return call.mixed(index, [at])


def _index_select(call: Call) -> Result:
    x, index = call.dims("self"), call.dims("index")
    at = call.arguments["dim"] % len(x)
    call.fix(x[at])
    return call.mixed((*x[:at], *(index or ((),)), *x[at + 1 :]), [at])


def _index(call: Call) -> Result:
    """x[i, :, j]: the numbers' own axes stand where the first stood, or in front when a slice parts them."""
    x, indices = call.dims("self"), call.arguments["indices"]
    if any(item is not None and "bool" in item.meta[_fx.TYPE] for item in indices):
        return unknown(call)
    looked_up = [i for i, item in enumerate(indices) if item is not None]
    rest = [axis for i, axis in enumerate(x) if i not in looked_up]
    call.fix(*(x[i] for i in looked_up))
    call.scope(*rest)
    together = looked_up == list(range(looked_up[0], looked_up[-1] + 1))
    at = looked_up[0] if together else 0
    numbers = broadcast(call, [call.dims_of(indices[i]) for i in looked_up])
    return (*rest[:at], *numbers, *rest[at:])


_NAMES: dict[str, Rule] = {
    """
    __and__ __or__ __xor__ abs add atan bitwise_and bitwise_not bitwise_or bitwise_xor ceil clamp clamp_max clamp_min
    cos div elu eq erf exp expm1 floor floor_divide fmod ge gelu gt hardsigmoid hardswish hardtanh isinf isnan le
    leaky_relu log log1p logical_and logical_not logical_or logical_xor lt masked_fill max.other maximum min.other
    minimum mish mul multiply ne neg pow reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin
    softplus sqrt square sub tan tanh true_divide where
    """: _elementwise,
    "alias clone contiguous detach dropout lift_fresh_copy to type_as": _same,
    "fill full full_like new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like": _constant,
    "arange eye linspace": _positions,
    "prelu": _prelu,
    "tril triu": _triangle,
    "all any amax amin linalg_vector_norm logsumexp max.default mean min.default norm prod std sum var": _reduce,
    "var_mean": _reduce_both,
    "argmax argmin max.dim min.dim": _reduce_ordered,
    "softmax _softmax log_softmax": _softmax,
    "argsort cumsum diff flip roll sort topk": _ordered,
    "constant_pad_nd pad": _pad,
    "adaptive_avg_pool1d": _pool_1d,
    "adaptive_avg_pool2d avg_pool2d max_pool2d upsample_bicubic2d upsample_bilinear2d upsample_nearest2d": _pool_2d,
    "layer_norm rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
    "index": _index,
}
RULES: dict[str, Rule] = {name: rule for names, rule in (_NAMES | VIEWS | PRODUCTS).items() for name in names.split()}
