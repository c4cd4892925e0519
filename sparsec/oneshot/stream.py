"""Run a graph for many batches side by side, up to a node, keeping only the values that are still needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sparsec import _fx

_HELD_ALONE = 256_000_000  # bytes that cross a stop of the only stream: fewer are always kept
_HELD_PAIRED = 16_000_000  # and in each of two
_WIDER = 1.5  # times what crossed the last stop

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule, Node


class Stream:
    """All batches, each run as far as the same node.

    1. Between two stops one batch is run after the other, so what lives only between them exists for one batch.
    2. A value is dropped after its last use.
    3. Whatever depends on parameters only is computed when it is used: a weight may change until then.
    4. Where what crosses a stop is large, and much larger than what crossed the last one (the wide middle of a
       feed-forward layer), it is not kept: it is computed batch by batch when it is looked at, and again on the way on.
    """

    def __init__(self, module: GraphModule, batches: Sequence[Sequence[Tensor]]) -> None:
        self._module = module
        self._order = list(module.graph.nodes)
        self._at = self._ahead = 0
        self._most = _HELD_ALONE
        self._crossed = 0.0  # bytes that crossed the last stop whose values were kept; the model's inputs do not count
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

    def fork(self) -> Stream:
        """Another stream at the same node with the same values."""
        self._most = _HELD_PAIRED
        twin = object.__new__(Stream)
        twin.__dict__ = {**self.__dict__, "_values": [dict(values) for values in self._values]}
        return twin

    def on(self, module: GraphModule) -> Stream:
        """This stream, with the parameters of another copy of the same graph from here on."""
        self._module = module
        return self

    def advance(self, until: Node) -> None:
        """Go to a node: every node before it has run, or runs when a value is asked for (rule 4)."""
        end = self._place[until]
        if end <= self._ahead or not self._values:
            return
        self._ahead = end
        first = dict(self._values[0])
        self._run_to(end, first)
        share = _nbytes(self._values[0]) / max(sum(map(_nbytes, self._values)), 1)
        crossing = _nbytes(first) / max(share, 1e-9)
        if self._crossed and crossing > self._most and crossing > _WIDER * self._crossed:
            return
        self._crossed = crossing
        self._values[0] = first
        for values in self._values[1:]:  # rule 1
            self._run_to(end, values)
        self._at = end

    def at(self, node: Node, source: Node) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """The arguments that a node is about to be called with, and what `source` gave, batch by batch."""
        for held in self._values:
            values = held
            if self._at < self._ahead:
                values = dict(held)
                self._run_to(self._ahead, values)
            yield self._mapped(node.args, values), self._value(source, values)

    def _run_to(self, end: int, values: dict[Node, Any]) -> None:
        import torch

        with torch.no_grad():
            for i in range(self._at, end):
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
