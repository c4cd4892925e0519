"""A graph module whose Python code is written when it is next needed, not after every edit of the graph."""

from __future__ import annotations

import copy
from typing import Any

from torch.fx import GraphModule

from sparsec import _fx


class LateModule(GraphModule):
    """A GraphModule in all else.

    1. `recompile` forgets the code. Whatever asks for it - a call, `forward`, `code`, printing - has it written first.
    2. It is pickled as an ordinary GraphModule.
    """

    def recompile(self) -> None:  # type: ignore[override]
        type(self).forward = property(_written)  # type: ignore[assignment]  # each module has a class of its own

    @property
    def code(self) -> str:
        _ = self.forward
        return super().code

    def __str__(self) -> str:
        _ = self.forward
        return super().__str__()

    def __reduce__(self) -> Any:
        return GraphModule(self, self.graph).__reduce__()  # rule 2


def _written(module: LateModule) -> Any:
    GraphModule.recompile(module)  # puts the function in the property's place
    return module.forward


def copy_of(module: GraphModule) -> LateModule:
    """Another module with a copy of the graph and the same tensors, those that no node reads included.

    Several times faster than copy.deepcopy.
    """
    twin = LateModule(module, copy.deepcopy(module.graph))
    known = dict(_tensors(twin))
    for name, tensor in _tensors(module):
        if name not in known:
            _fx.set_tensor(twin, name, tensor)
    return twin


def _tensors(module: GraphModule) -> list[tuple[str, Any]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
