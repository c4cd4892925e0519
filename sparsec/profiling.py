"""Where the time of a dense program goes: the whole, what is left without its sites' products, and every call."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.uses import operation

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from sparsec.program import Program

_LEAST, _MOST = 4, 40  # runs of one profile


@dataclass(frozen=True)
class NodeTime:
    """One call of the graph: its operator, its seconds, and how many vectors (of the last dimension) it gives."""

    operation: str
    seconds: float
    rows: int


@dataclass(frozen=True)
class Profile:
    """Seconds of one run, and of each call by node name. Calls are timed one by one and do not add up to the whole
    exactly: they are good as shares of it."""

    tokens: int
    seconds: float
    rest: float
    """Seconds of the same program when the products it was asked to leave out are given for nothing."""
    nodes: dict[str, NodeTime]


def profile(
    program: Program, without: Collection[str], inputs: dict[str, Tensor], tokens: int, budget_seconds: float = 1.0
) -> Profile:
    """Run the program whole, without the nodes named in `without`, and call by call, in turns.

    The fastest fifth of the runs ends; one thread is timed in thread CPU time, several in wall time. `tokens` is what
    the profile is said to be of.
    """
    import torch

    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls, arguments = _Calls(clock), [inputs[name] for name in program.inputs]
    whole: list[float] = []
    rest: list[float] = []
    with torch.no_grad():
        calls.run(program.module, arguments)  # warms up, and says which values the left-out nodes have
        stubbed = _without(program, {name: calls.values[name] for name in without})
        calls = _Calls(clock)
        end = time.perf_counter() + budget_seconds
        while len(whole) < _LEAST or (time.perf_counter() < end and len(whole) < _MOST):
            for module, taken in ((program.module, whole), (stubbed, rest)):
                start = clock()
                module(*arguments)
                taken.append(clock() - start)
            calls.run(program.module, arguments)
    return Profile(tokens, low(whole), min(low(rest), low(whole)) if without else low(whole), calls.times())


def low(samples: list[float]) -> float:
    """Where the fastest fifth ends: steadier than the very fastest, and no neighbour's work in it."""
    return sorted(samples)[len(samples) // 5]


def _without(program: Program, values: dict[str, Tensor]) -> GraphModule:
    """The graph with some nodes replaced by constants, one for all of a shape; everything else still runs."""
    module = program.clone().module
    for node in list(module.graph.nodes):
        if node.name in values:
            value = values[node.name]
            name = "given_" + "_".join(map(str, value.shape))
            if not _fx.has_tensor(module, name):
                _fx.set_tensor(module, name, value)
            _fx.replace(node, _fx.attribute(module, name, node))
    module.recompile()
    return module


class _Calls:
    """Times the calls of a graph one by one, over several runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.samples: dict[str, tuple[str, list[float]]] = {}
        self.values: dict[str, Tensor] = {}
        """What the calls gave in the last run, one tensor for all of a shape."""

    def run(self, module: GraphModule, arguments: list[Any]) -> None:
        """One run, each call timed."""
        import torch
        from torch.fx import Interpreter

        outer, shapes = self, dict[Any, torch.Tensor]()

        class Timed(Interpreter):
            def run_node(self, n: Any) -> Any:
                if n.op != "call_function":
                    return super().run_node(n)
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                start = outer.clock()
                result = n.target(*args, **kwargs)
                seconds = outer.clock() - start
                outer.samples.setdefault(n.name, (operation(n), []))[1].append(seconds)
                if isinstance(result, torch.Tensor):
                    outer.values[n.name] = shapes.setdefault((result.shape, result.dtype), result)
                return result

        Timed(module).run(*arguments)

    def times(self) -> dict[str, NodeTime]:
        """Seconds and rows of each call."""
        shapes = {name: value.shape for name, value in self.values.items()}
        rows = {name: shape.numel() // max(shape[-1], 1) if shape else 1 for name, shape in shapes.items()}
        return {name: NodeTime(kind, low(taken), rows.get(name, 0)) for name, (kind, taken) in self.samples.items()}
