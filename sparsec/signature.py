"""The inputs that a program takes: their names, sizes and types, and batches of samples made to fit them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsec.encoding import Sample
from sparsec.errors import UsageError
from sparsec.sources import IDS

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

_TOKENS = 2048  # of a batch, about: enough for matrix products at full speed
_PICTURES = 8  # of a batch
_DECODER = "decoder_input_ids"
_MADE = (IDS, "attention_mask", "token_type_ids", _DECODER)
Axis = int | tuple[int, int | None]
"""A fixed size, or the least and the largest of one that varies."""


@dataclass(frozen=True)
class Signature:
    """What a program's inputs may be."""

    program: Program
    axes: dict[str, list[Axis]]
    """Input name -> its sizes, outermost first."""
    words: str
    """`the model takes input_ids (int64[batch, length])`."""

    @staticmethod
    def of(program: Program) -> Signature:
        """The signature of a program."""
        types = {node.target: node.meta["type"] for node in program.module.graph.nodes if node.op == "placeholder"}
        axes: dict[str, list[Axis]] = {}
        for name in program.inputs:
            kind = types[name]
            sizes = [size for size in kind[kind.index("[") + 1 : -1].split(", ") if size]
            axes[name] = [int(size) if size.isdigit() else program.dims.get(size, (1, None)) for size in sizes]
        listed = ", ".join(f"{name} ({types[name]})" for name in program.inputs)
        return Signature(program, axes, f"the model takes {listed}")

    @property
    def ids(self) -> str | None:
        """The input for token ids: of that name, or the only one, if it holds rows of integers."""
        if IDS in self.axes or len(self.axes) != 1:
            return IDS if IDS in self.axes else None
        name, value = next(iter(self.program.inputs.items()))
        return name if value.dim() == 2 and not value.is_floating_point() else None

    @property
    def least(self) -> int:
        """Fewest tokens of a sample."""
        assert self.ids
        decoder = self.axes.get(_DECODER, [1, 1])[1]
        return max(_least(self.axes[self.ids][1]), decoder if isinstance(decoder, int) else 1)

    @property
    def most(self) -> int | None:
        """Most tokens of a sample, where there is a limit."""
        assert self.ids
        axis = self.axes[self.ids][1]
        return axis if isinstance(axis, int) else axis[1]

    @property
    def vocabulary(self) -> int | None:
        """Rows of the embedding that token ids are looked up in, where the graph shows it directly."""
        for node in self.program.module.graph.nodes:
            if str(node.target) == "aten.embedding.default" and str(node.args[1].target) == self.ids:
                return int(self.program.module.get_parameter(str(node.args[0].target)).shape[0])
        return None

    @property
    def one_by_one(self) -> bool:
        """Whether a batch can be split into single samples."""
        return all(axes and not isinstance(axes[0], int) and axes[0][0] <= 1 for axes in self.axes.values())

    def token_batches(self, samples: Sequence[Sample], size: int | None = None) -> tuple[dict[str, Tensor], ...]:
        """Samples of one length together, short ones first, `size` in a batch or by their tokens.

        Raises UsageError for an input that no tokens make.
        """
        import torch

        assert self.ids
        if unknown := [name for name in self.axes if name not in (*_MADE, self.ids)]:
            raise UsageError(
                f"{self.words}; text and token ids make no {unknown[0]}: give whole inputs in Python, calibration=[...]"
            )
        by_length: dict[int, list[Sample]] = {}
        for one in samples:
            by_length.setdefault(len(one.ids), []).append(one)
        batches = []
        for length, group in sorted(by_length.items()):
            for part in self._cut(self.ids, group, size or max(1, _TOKENS // length)):
                ids = torch.tensor([one.ids for one in part])
                types = torch.tensor([one.types or [0] * length for one in part])
                made = {"attention_mask": torch.ones_like(ids), "token_type_ids": types, self.ids: ids}
                made[_DECODER] = ids[:, : self._decoder_length(length)]
                batches.append({name: made[name].to(value.dtype) for name, value in self.program.inputs.items()})
        return tuple(batches)

    def _decoder_length(self, length: int) -> int:
        axis = self.axes.get(_DECODER, [1, (1, None)])[1]
        return axis if isinstance(axis, int) else max(axis[0], min(length // 2, axis[1] or length))

    def picture_batches(
        self, pictures: Sequence[tuple[str, Tensor]], size: int = _PICTURES
    ) -> tuple[dict[str, Tensor], ...]:
        """Pictures, named for errors, as (batch, channels, height, width)."""
        import torch

        example = self.program.inputs["pixel_values"]
        for name, one in pictures:
            if one.shape != example.shape[1:]:
                raise UsageError(
                    f"{name}: the image processor makes {list(one.shape)} of it; {self.words}: correct the model's "
                    "preprocessor_config.json"
                )
        parts = self._cut("pixel_values", pictures, size)
        return tuple({"pixel_values": torch.stack([one for _, one in part]).to(example.dtype)} for part in parts)

    def _cut(self, name: str, items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
        """Parts of about `size`; where the model takes only batches of one size, those, without the rest."""
        size, last = self.batch(name, size), len(items)
        if isinstance(self.axes[name][0], int):
            last -= size - 1
        return (items[i : i + size] for i in range(0, last, size))

    def batch(self, name: str, size: int) -> int:
        """Samples of a batch, `size` of them where the model takes so many as this input."""
        batch = self.axes[name][0]
        return batch if isinstance(batch, int) else min(size, batch[1] or size)

    def check(self, batch: Mapping[str, Tensor], place: str) -> None:
        """Raise UsageError unless the program takes these inputs."""
        if sorted(batch) != sorted(self.axes):
            raise UsageError(f"{place} has {', '.join(batch)}; {self.words}")
        for name, value in batch.items():
            fits = len(self.axes[name]) == value.dim() and all(map(_allows, self.axes[name], value.shape))
            if not fits or value.dtype != self.program.inputs[name].dtype:
                found = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
                sizes = (f"{size} {low} to {high or 'any'}" for size, (low, high) in self.program.dims.items())
                raise UsageError(f"{place}: {name} is {found}; {self.words}, {', '.join(sizes) or 'all sizes fixed'}")


def _least(axis: Axis) -> int:
    return axis if isinstance(axis, int) else axis[0]


def _allows(axis: Axis, size: int) -> bool:
    return size == axis if isinstance(axis, int) else axis[0] <= size <= (axis[1] or size)
