"""Where the time of a dense program would go on a machine that is not here: every call by what it computes and moves.

1. Nothing is computed: the graph runs on tensors without data.
2. A call takes what its products or its tensors take, the slower of both; floats have 16 bits. A view takes nothing,
   and of a table that is looked up only what is found is read.
3. The whole is the sum of its calls: they run one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from sparsec.profiling import NodeTime, Profile
from sparsec.uses import operation

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import Node

    from sparsec.program import Program

Seconds = Callable[[float, float], float]
"""(operations, bytes) of a call -> its seconds."""
_FLOAT_BYTES = 2  # rule 2
_LOOK_UP = ("embedding", "index", "index_select", "gather")


def imagine(
    program: Program, without: Collection[str], inputs: dict[str, Tensor], tokens: int, seconds: Seconds
) -> Profile:
    """The profile of a program, as `profiling.profile` would measure it; nodes in `without` are not in its `rest`."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import Interpreter

    times: dict[str, NodeTime] = {}

    class Counted(Interpreter):
        def run_node(self, n: Any) -> Any:
            result = super().run_node(n)
            if n.op == "call_function":
                read = [self.env[one] for one in n.all_input_nodes]
                times[n.name] = NodeTime(operation(n), _seconds(n, read, result, seconds), _rows(result))
            return result

    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        given = [fake.from_tensor(inputs[name]) for name in program.inputs]
        Counted(program.module, garbage_collect_values=False).run(*given)
    whole = sum(one.seconds for one in times.values())
    return Profile(tokens, whole, whole - sum(times[name].seconds for name in without), times)


def _seconds(node: Node, read: list[Any], result: Any, seconds: Seconds) -> float:
    made = [one for one in (result if isinstance(result, (tuple, list)) else [result]) if _is_tensor(one)]
    if _is_view(node) or not made:
        return 0.0
    given = made if operation(node) in _LOOK_UP else [one for one in read if _is_tensor(one)]
    return seconds(_operations(node, read, result), sum(map(_nbytes, [*given, *made])))


def _operations(node: Node, read: list[Any], result: Any) -> float:
    """Multiplications and additions of a product; 0 for what is no product."""
    return 2.0 * _products(operation(node), read, result)


def _products(kind: str, read: list[Any], result: Any) -> int:
    if kind in ("linear", "mm", "bmm", "matmul", "expert_linear"):
        return int(result.numel() * read[0].shape[-1])
    if kind in ("addmm", "baddbmm"):
        return int(result.numel() * read[1].shape[-1])
    if kind in ("conv1d", "conv2d"):
        return int(result.numel() * math.prod(read[1].shape[1:]))
    if kind == "scaled_dot_product_attention":
        return int(read[1].shape[-2] * (read[0].numel() + result.numel()))
    return 0


def _is_view(node: Node) -> bool:
    """Whether its result is a part of what it reads."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True  # Python's own, on sizes and tuples
    found = schema.returns[0].alias_info if schema.returns else None
    return found is not None and not found.is_write


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * (_FLOAT_BYTES if tensor.is_floating_point() else tensor.element_size())


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _rows(result: Any) -> int:
    """How many vectors of the last dimension a call gives."""
    if not _is_tensor(result):
        return 0
    return int(result.numel() // max(result.shape[-1], 1)) if result.dim() else 1
