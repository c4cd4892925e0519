"""Memory for the values of many batches that is laid out in few large blocks.

What a batch keeps and what it computes with and drops would else lie side by side in the C library's heap, and each
value kept among dropped ones leaves a hole, which stays resident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Name = TypeVar("Name")
_SMALL = 1 << 10  # bytes; smaller tensors stay where they are
_ALIGNED = 64  # bytes that a slot's size is a multiple of


class Shelf:
    """Slots for each batch's values. They are what its last values have left, else the next ones of a block.

    `alike`: for each batch, how many have tensors of its sizes. A block has room for that many; the system gives it
    memory only where something is written, and takes it back with the last of its slots.
    """

    def __init__(self, alike: Sequence[int]) -> None:
        self.alike = alike
        self._slots: list[list[Tensor]] = [[] for _ in alike]  # each (bytes,) uint8, a part of a block
        self._blocks: dict[int, Tensor] = {}  # by size of a slot: what is left of the block

    def begin(self) -> None:
        """From here on, new slots come from new blocks."""
        self._blocks = {}

    def keep(self, batch: int, values: Mapping[Name, Any]) -> dict[Name, Any]:
        """The same values, the large tensors among them in slots of the batch.

        What the batch kept before is written over, but for slots of which a value still reads a part.
        """
        import torch
        from torch.utils import _pytree

        tensors = [value for value in _pytree.tree_leaves(list(values.values())) if isinstance(value, torch.Tensor)]
        used = [slot for slot in self._slots[batch] if any(_holds(slot, value) for value in tensors)]
        free = [slot for slot in self._slots[batch] if not any(slot is one for one in used)]
        moved: dict[tuple[int, int], Tensor] = {}  # views of one memory share a slot
        kept = dict(values)
        for name, value in values.items():
            memory = _memory(value)
            if memory is None or any(_holds(slot, value) for slot in used):
                continue
            key, nbytes = (value.data_ptr(), memory.nbytes), -(-memory.nbytes // _ALIGNED) * _ALIGNED
            if key not in moved:
                fitting = [i for i, slot in enumerate(free) if len(slot) == nbytes]
                moved[key] = free.pop(fitting[0]) if fitting else self._new(nbytes, self.alike[batch])
            place = moved[key][: memory.nbytes].view(value.dtype)
            place.as_strided(memory.shape, memory.stride()).copy_(memory)
            kept[name] = place.as_strided(value.shape, value.stride())
        self._slots[batch] = [*used, *moved.values()]
        return kept

    def _new(self, nbytes: int, count: int) -> Tensor:
        import torch

        left = self._blocks.get(nbytes)
        if left is None or not len(left):
            left = torch.empty(nbytes * count, dtype=torch.uint8)
        self._blocks[nbytes] = left[nbytes:]
        return left[:nbytes]


def _holds(slot: Tensor, value: Tensor) -> bool:
    """Whether a tensor lies in a slot."""
    return 0 <= value.data_ptr() - slot.data_ptr() < len(slot)


def _memory(value: Any) -> Tensor | None:
    """Every element of a tensor's memory once; None for what is not moved: small, with gaps, or not on the CPU."""
    import torch

    if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
        return None
    once = value.as_strided([n if s else 1 for n, s in zip(value.shape, value.stride(), strict=True)], value.stride())
    width = 1
    for stride, size in sorted((s, n) for s, n in zip(once.stride(), once.shape, strict=True) if n > 1):
        if stride != width:
            return None
        width *= size
    return once if once.nbytes >= _SMALL else None
