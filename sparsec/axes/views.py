"""Axis rules of operators that only rearrange elements: other shapes, other orders of axes, parts and their joins."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.axes.atoms import Axis
from sparsec.axes.calls import Call, Dims, Result, Rule, broadcast, copies, positional, unknown
from sparsec.axes.sizes import ONE, Size


def _reshape(call: Call) -> Result:
    joined = tuple(atom for axis in call.tensors()[0] for atom in axis)
    result = tuple(call.atoms.regroup(joined, call.shape, call.why))
    known = set(call.atoms.flat(joined))
    call.scope(*(axis for axis in result if known.issuperset(call.atoms.flat(axis))))  # others are fixed and reordered
    return result


def _permute(call: Call) -> Result:
    x = call.dims("self")
    return tuple(x[axis] for axis in call.axes("dims", x))


def _transpose(call: Call) -> Result:
    x = list(call.dims("self"))
    if x:
        a, b = (call.arguments[name] % len(x) for name in ("dim0", "dim1"))
        x[a], x[b] = x[b], x[a]
    return tuple(x)


def _reverse(call: Call) -> Result:
    return call.dims("self")[::-1]


def _movedim(call: Call) -> Result:
    x = list(call.dims("self"))
    moved = x.pop(call.arguments["source"] % len(x))
    x.insert(call.arguments["destination"] % (len(x) + 1), moved)
    return tuple(x)


def _expand(call: Call) -> Result:
    """A dimension of size 1 is repeated: any permutation of the copies leaves them as they are."""
    x = call.tensors()[0]
    x = ((),) * (len(call.shape) - len(x)) + x
    return tuple(axis or call.atoms.new(size) for axis, size in zip(x, call.shape, strict=True))


def _repeat(call: Call) -> Result:
    x = call.dims("self")
    x = ((),) * (len(call.shape) - len(x)) + x
    return tuple(copies(call, axis, size) + axis for axis, size in zip(x, call.shape, strict=True))


def _repeat_interleave(call: Call) -> Result:
    x = call.dims("self")
    if call.arguments["dim"] is None:
        x, at = (tuple(atom for axis in x for atom in axis),), 0
    else:
        at = call.arguments["dim"] % len(x)
    return (*x[:at], x[at] + copies(call, x[at], call.shape[at]), *x[at + 1 :])


# Parts of an axis.


def _slice(call: Call) -> Result:
    x = call.dims("self")
    at = call.arguments["dim"] % len(x)
    whole, size = call.atoms.size(x[at]), call.shape[at]
    if whole == size:
        return x
    start = call.arguments["start"] or 0
    if not (whole.static and size.static and isinstance(start, int) and call.arguments.get("step", 1) == 1):
        return positional(call, x, [at], call.shape)
    start = min(max(0, start + whole.count if start < 0 else start), whole.count - size.count)
    call.mixed(x, [at])
    pieces = _cut(call, x[at], [start, size.count, whole.count - start - size.count])
    return (*x[:at], pieces[1], *x[at + 1 :])


def _select(call: Call) -> Result:
    return _selected(call)


def _selected(call: Call) -> Dims:
    x = call.dims("self")
    at = call.arguments["dim"] % len(x)
    call.fix(x[at])
    return call.mixed(x[:at] + x[at + 1 :], [])


def _chunk(call: Call) -> Result:
    """chunk, split, split_with_sizes, tensor_split: consecutive parts whose sizes the node's type gives."""
    x = call.dims("self")
    at = call.arguments["dim"] % len(x)
    sizes = [shape[at] for shape in call.shapes]
    if not all(size.static for size in sizes):
        positional(call, x, [at], [ONE] * len(x))
        return [(*x[:at], call.fixed(size), *x[at + 1 :]) for size in sizes]
    call.mixed(x, [at])
    pieces = _cut(call, x[at], [size.count for size in sizes])
    return [(*x[:at], piece, *x[at + 1 :]) for piece in pieces]


def _unbind(call: Call) -> Result:
    return [_selected(call)] * len(call.shapes)


def _glu(call: Call) -> Result:
    x = call.dims("self")
    at = call.arguments["dim"] % len(x)
    if not call.shape[at].static:
        return positional(call, x, [at], call.shape)
    call.mixed(x, [at])
    first, second = _cut(call, x[at], [call.shape[at].count] * 2)
    call.unite(first, second)
    return (*x[:at], first, *x[at + 1 :])


def _cat(call: Call) -> Result:
    tensors = [dims for dims in call.tensors() if not any(call.atoms.size(axis) == Size(0) for axis in dims)]
    if not tensors:
        return unknown(call)
    at = call.arguments["dim"] % len(call.shape)
    joined = call.atoms.join([dims[at] for dims in tensors], call.shape[at])
    rest = broadcast(call, [(*dims[:at], (), *dims[at + 1 :]) for dims in tensors])
    return (*rest[:at], joined, *rest[at + 1 :])


def _stack(call: Call) -> Result:
    at = call.arguments["dim"] % len(call.shape)
    rest = broadcast(call, call.tensors())
    return (*rest[:at], call.fixed(call.shape[at]), *rest[at:])


def _cut(call: Call, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Parts of an axis, empty ones included."""
    pieces = iter(call.atoms.cut(axis, [size for size in sizes if size], call.why))
    return [next(pieces) if size else call.fixed(Size(0)) for size in sizes]


VIEWS: dict[str, Rule] = {
    "flatten reshape reshape_as squeeze unflatten unsqueeze view view_as": _reshape,
    "permute": _permute,
    "transpose": _transpose,
    "t numpy_T": _reverse,
    "movedim": _movedim,
    "expand expand_as": _expand,
    "repeat": _repeat,
    "repeat_interleave.self_int": _repeat_interleave,
    "narrow slice": _slice,
    "select": _select,
    "chunk split split_with_sizes tensor_split": _chunk,
    "unbind": _unbind,
    "glu": _glu,
    "cat": _cat,
    "stack": _stack,
}
"""Rules by the names of their operators."""
