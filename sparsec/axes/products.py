"""Axis rules of operators that sum products: linear layers, matrix products, attention and convolutions."""

from __future__ import annotations

from sparsec.axes.atoms import Axis
from sparsec.axes.calls import Call, Dims, Result, Rule, broadcast, copies, unknown
from sparsec.axes.sizes import Size


def _linear(call: Call) -> Result:
    x, weight = call.dims("input"), call.dims("weight")
    call.unite(x[-1], weight[-1])
    if call.has("bias"):
        broadcast(call, [weight[:-1], call.dims("bias")])
    call.scope(*x, *weight[:-1])
    return x[:-1] + weight[:-1]


def _matmul(call: Call) -> Result:
    left, right = (call.dims(name) for name in list(call.arguments)[:2])
    return _product(call, left, right)


def _add_matmul(call: Call) -> Result:
    """addmm and baddbmm."""
    left, right = (call.dims(name) for name in list(call.arguments)[1:3])
    return broadcast(call, [_product(call, left, right), call.dims("self")])


def _outer(call: Call) -> Result:
    return call.dims("self") + call.dims("vec2")


def _product(call: Call, left: Dims, right: Dims) -> Dims:
    rows, cols = left[-2:-1], right[-1:] if len(right) > 1 else ()
    batch = broadcast(call, [left[:-2], right[:-2]])
    call.unite(left[-1], right[-2] if len(right) > 1 else right[0])
    call.scope(*batch, *rows, *cols, left[-1])
    return batch + rows + cols


def _einsum(call: Call) -> Result:
    terms, _, result = call.arguments["equation"].replace(" ", "").partition("->")
    tensors = call.tensors()
    axes: dict[str, Axis] = {}
    if "." in terms or not result or any(len(set(term)) < len(term) for term in terms.split(",")):
        return unknown(call)
    for term, dims in zip(terms.split(","), tensors, strict=True):
        for letter, axis in zip(term, dims, strict=True):
            call.unite(axes.setdefault(letter, axis), axis)
    call.scope(*axes.values())
    return tuple(axes[letter] for letter in result)


def _attention(call: Call) -> Result:
    """softmax(query key^T + mask) value; with enable_gqa each key and value head serves several query heads."""
    query, key, value = (call.dims(name) for name in ("query", "key", "value"))
    if call.arguments.get("enable_gqa"):
        served = copies(call, key[-3], call.atoms.size(query[-3]))
        key, value = ((*dims[:-3], dims[-3] + served, *dims[-2:]) for dims in (key, value))
    batch = broadcast(call, [query[:-2], key[:-2], value[:-2]])
    call.unite(query[-1], key[-1])
    call.unite(key[-2], value[-2])
    scores = (*batch, query[-2], key[-2])
    if call.has("attn_mask"):
        broadcast(call, [scores, call.dims("attn_mask")])
    if call.arguments.get("is_causal"):
        call.fix(*scores[-2:])
    call.scope(*scores, key[-1])
    call.mixed(scores, [len(scores) - 1])
    call.scope(*scores)
    call.scope(*scores, value[-1])
    return (*batch, query[-2], value[-1])


def _convolution(call: Call) -> Result:
    """x: (batch, channels, places ...), weight: (rows, channels / groups, kernel ...)."""
    x, weight, groups = call.dims("input"), call.dims("weight"), Size(call.arguments["groups"])
    first = len(x) - len(weight) + 2
    outs = call.atoms.size(weight[0]).over(groups)
    if outs is None:
        return unknown(call)
    group, each = call.atoms.regroup(weight[0], [groups, outs], call.why)
    call.unite(x[first - 1], group + weight[1])
    if call.has("bias"):
        call.unite(weight[0], call.dims("bias")[0])
    call.fix(*weight[2:], *x[first:])
    call.scope(*x[: first - 1], group, each, weight[1])
    return (*x[: first - 1], group + each, *(call.fixed(size) for size in call.shape[first:]))


def _expert_linear(call: Call) -> Result:
    """x: (rows, in), sorted by expert; offsets: (experts,), where each one's rows end; weight: (experts, in, out)."""
    x, weight = call.dims("x"), call.dims("weight")
    call.fix(x[0], weight[0], *call.dims("offsets"))
    call.unite(x[1], weight[1])
    call.scope(x[0], x[1], weight[2])
    return (x[0], weight[2])


PRODUCTS: dict[str, Rule] = {
    "linear": _linear,
    "bmm dot matmul mm mv": _matmul,
    "addmm baddbmm": _add_matmul,
    "outer": _outer,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "conv1d conv2d": _convolution,
    "sparsec.expert_linear.default": _expert_linear,
}
"""Rules by the names of their operators."""
