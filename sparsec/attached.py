"""What `attach` did to a model, and how that is undone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


@dataclass
class Attached:
    """What `attach` did."""

    path: str
    layers: tuple[str, ...] = ()
    """The weights that a sparse kernel multiplies, by the model's names."""
    dense: dict[str, str] = field(default_factory=dict)
    """Sparse weights that run dense, each with the reason."""
    _undo: list[tuple[nn.Module, str, str, Any]] | None = field(default_factory=list, repr=False)
    """(module, which of its dictionaries, key, what was there), in order."""
    _hooks: list[RemovableHandle] = field(default_factory=list, repr=False)

    def put(self, module: nn.Module, where: str, key: str, value: Any) -> None:
        """Replace an entry of a module's parameters, buffers or modules."""
        assert self._undo is not None
        entries = getattr(module, where)
        self._undo.append((module, where, key, entries[key]))
        entries[key] = value

    def put_back(self, module: nn.Module, where: str, key: str) -> None:
        """Replace an entry by what was there at first."""
        assert self._undo is not None
        first = next(old for *place, old in self._undo if place[0] is module and place[1:] == [where, key])
        self.put(module, where, key, first)

    def share(self, model: nn.Module, hooks: Callable[[nn.Module], Iterable[RemovableHandle]]) -> None:
        """Give hooks to every module that holds several layers."""
        holders = Counter(name.rpartition(".")[0].rpartition(".")[0] for name in self.layers)
        for path, count in holders.items():
            if count > 1:
                self._hooks += hooks(model.get_submodule(path))

    def undo(self) -> None:
        """Put everything back."""
        if self._undo is None:
            raise UsageError(
                f"the model's own weights were dropped when {self.path} was attached: load the model again, or attach "
                'with originals="keep"'
            )
        while self._hooks:
            self._hooks.pop().remove()
        while self._undo:
            module, where, key, value = self._undo.pop()
            getattr(module, where)[key] = value

    def forget(self) -> None:
        """Let what was replaced go."""
        self._undo = None
