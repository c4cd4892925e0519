"""Run a graph for many batches side by side, up to a node, keeping only the values that are still needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sparsec import _fx, mapping
from sparsec.oneshot.shelf import Shelf
from sparsec.uses import operation

_HELD_ALONE = 128_000_000  # bytes that the only stream may keep at any stop
_HELD_PAIRED = 16_000_000  # and each of two
_WIDER = 2.0  # or so many times what it kept at the last one, less what is needed there for other things
_FILLED = 48_000_000  # bytes up to which it may keep in any case where not all can be kept
_TRIMMED, _MUCH = 16, 16_000_000  # batches after which freed memory is given back, where so many bytes are kept
_COSTLY = frozenset(  # operators that are run twice only for memory's sake
    "linear addmm mm matmul bmm baddbmm einsum conv1d conv2d conv3d scaled_dot_product_attention expert_linear "
    "embedding".split()
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node


class Stream:
    """All batches, each run as far as the same node.

    1. Between two stops one batch is run after the other, so what lives only between them exists for one batch.
    2. A value is dropped after its last use.
    3. Whatever depends on parameters only is computed when it is used: a weight may change until then.
    4. Values are kept where they are fewest between the last product of matrices (or lookup) and a stop. What stands
       between, such as a normalisation, is computed batch by batch when it is looked at, and again on the way on.
    5. Where these are many still, and many more than at the last stop (the wide middle of a feed-forward layer), only
       the batches go there for which there is room. The others stay at the last stop's values, but not twice in a row.
    6. What is kept lies in a few blocks of its own (`Shelf`), not among what is computed with and dropped.
    """

    def __init__(self, module: GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        self._module = module
        self._order = list(module.graph.nodes)
        self._ahead = 0
        self._most = _HELD_ALONE
        self._kept = 0.0  # bytes at the last stop that all batches went to; the model's inputs do not count
        self._place = {node: i for i, node in enumerate(self._order)}
        self._deferred = _weights_only(self._order)
        uses: dict[Node, int] = {}
        for node in self._order:
            for operand in node.all_input_nodes:
                uses[operand] = self._place[node]
        self._dropped_after: dict[int, list[Node]] = {}
        for operand, last in uses.items():
            self._dropped_after.setdefault(last, []).append(operand)
        inputs = [node for node in self._order if node.op == "placeholder"]
        self._values: list[dict[Node, Any]] = [dict(zip(inputs, batch, strict=True)) for batch in batches]
        self._share = _nbytes(self._values[0]) / max(1, sum(map(_nbytes, self._values))) if batches else 1.0
        self._at = [0] * len(batches)
        shapes = [tuple(each.shape for each in batch) for batch in batches]
        self._shelf = Shelf([shapes.count(each) for each in shapes])
        self._behind = False  # whether some stayed behind at the last stop

    def fork(self) -> Stream:
        """Another stream at the same node with the same values."""
        self._most = _HELD_PAIRED
        twin = object.__new__(Stream)
        self._shelf = Shelf(self._shelf.alike)  # what the two share is not written over
        copied = {"_values": [dict(values) for values in self._values], "_at": list(self._at)}
        copied["_shelf"] = Shelf(self._shelf.alike)
        twin.__dict__ = {**self.__dict__, **copied}
        return twin

    def on(self, module: GraphModule) -> Stream:
        """This stream, with the parameters of another copy of the same graph from here on."""
        self._module = module
        return self

    def advance(self, until: Node, beside: int = 0) -> None:
        """Go to a node: every node before it has run, or runs when a value is asked for (rules 4, 5).

        `beside`: bytes that are needed there for other things.
        """
        end = self._place[until]
        if end <= self._ahead or not self._values:
            return
        self._ahead = end
        now = sum(map(_nbytes, self._values))
        place, first = self._narrowest(dict(self._values[0]), self._at[0], end)
        crossing = _nbytes(first) / max(self._share, 1e-9)
        room, count = _WIDER * self._kept - beside, len(self._values)
        self._behind = bool(self._kept) and crossing > max(self._most, room, now) and not self._behind
        if self._behind:
            room = max(room, min(self._most, _FILLED))
            count = int(count * max(0.0, room - now) / (crossing - now))
        else:
            self._kept = crossing
        self._shelf.begin()
        for i in range(count):  # rule 1
            values = self._values[i] if i else first
            if i:
                self._run_to(self._at[i], place, values)
            self._values[i] = self._shelf.keep(i, values)
            self._at[i] = max(place, self._at[i])
            self._trim(i)

    def _trim(self, batch: int) -> None:
        """Temporary values spread over all free memory of the C library's heap, which stays resident."""
        if batch % _TRIMMED == _TRIMMED - 1 and self._kept > _MUCH:
            mapping.trim()

    def _narrowest(self, values: dict[Node, Any], start: int, end: int) -> tuple[int, dict[Node, Any]]:
        """Run a batch from `start` to `end`: the place of rule 4, and the values there."""
        import torch

        place, fewest, found = start, _nbytes(values), dict(values)
        with torch.no_grad():
            for i in range(start, end):
                self._run(self._order[i], i, values)
                bytes_now = _nbytes(values)
                if bytes_now <= fewest or operation(self._order[i]) in _COSTLY:
                    place, fewest, found = i + 1, bytes_now, dict(values)
        return place, found

    def at(self, node: Node, source: Node) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """The arguments that a node is about to be called with, and what `source` gave, batch by batch."""
        for i, (place, held) in enumerate(zip(self._at, self._values, strict=True)):
            values = held
            if place < self._ahead:
                values = dict(held)
                self._run_to(place, self._ahead, values)
            yield self._mapped(node.args, values), self._value(source, values)
            del values
            self._trim(i)

    def _run_to(self, start: int, end: int, values: dict[Node, Any]) -> None:
        import torch

        with torch.no_grad():
            for i in range(start, end):
                self._run(self._order[i], i, values)

    def _run(self, node: Node, place: int, values: dict[Node, Any]) -> None:
        if node.op == "call_function" and node not in self._deferred:
            target: Any = node.target
            values[node] = target(*self._mapped(node.args, values), **self._mapped(node.kwargs, values))
        for operand in self._dropped_after.get(place, ()):
            values.pop(operand, None)  # rule 2

    def _mapped(self, arguments: Any, values: dict[Node, Any]) -> Any:
        from torch.fx import map_arg

        return map_arg(arguments, lambda node: self._value(node, values))

    def _value(self, node: Node, values: dict[Node, Any]) -> Any:
        if node in values:
            return values[node]
        if node.op == "get_attr":
            return _fx.get_tensor(self._module, str(node.target))
        target: Any = node.target  # rule 3
        return target(*self._mapped(node.args, values), **self._mapped(node.kwargs, values))


def _nbytes(values: dict[Node, Any]) -> int:
    """Bytes of the tensors among values; views of one memory count as often as they stand there."""
    return sum(int(getattr(value, "nbytes", 0)) for value in values.values())


def _weights_only(order: Sequence[Node]) -> set[Node]:
    """The nodes that read parameters and nothing that depends on an input."""
    found: set[Node] = set()
    for node in order:
        operands = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and operands and found.issuperset(operands)):
            found.add(node)
    return found
