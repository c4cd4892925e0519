"""Write a pruned .onnx file: the same nodes, the same tensors but the pruned ones, and no initializer that is not read.

1. What lay in the file stays in it, what lay outside stays outside, in one file beside the new one.
2. External data is copied tensor by tensor; of pruned tensors one is in memory at a time.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from sparsec.errors import ArtifactError
from sparsec.onnxfile.opened import OnnxFile, is_external, tensors_of

if TYPE_CHECKING:
    from torch import Tensor

_ALIGNMENT = 4096  # a page, so that runtimes can map every tensor
_CHUNK = 1 << 26
Edits = Mapping[str, Callable[[], "Tensor"]]
"""Name of a constant of the main graph -> what makes its new values, of the same type and shape."""


def write(file: OnnxFile, out: Path, edits: Edits, notes: Mapping[str, str]) -> list[str]:
    """Write `out`, with `notes` among its metadata; returns the initializers that were dropped because none is read.

    `file` is spent afterwards: its protobuf object is the new one.
    """
    dropped = [name for name, tensor in tensors_of(file.model) if name and _unread(file, name, tensor)]
    places: list[tuple[Any, int, int]] = []
    data = out.with_name(out.name + ".data")
    external = any(is_external(tensor) for name, tensor in tensors_of(file.model) if name not in dropped)
    with data.open("wb") if external else io.BytesIO() as target:
        for name, tensor in tensors_of(file.model):
            if name in dropped:
                continue
            new = _bytes(edits[name]()) if name in edits else None
            if is_external(tensor):
                places.append((tensor, *_append(file, tensor, new, target)))
            elif new is not None:
                _replace(tensor, new)
    for tensor, offset, nbytes in places:  # not before: scales and zero points were read from the old places
        _move(tensor, data.name, offset, nbytes)
    kept = [tensor for tensor in file.model.graph.initializer if tensor.name not in dropped]
    if dropped:
        del file.model.graph.initializer[:]
        file.model.graph.initializer.extend(kept)
    for key, text in notes.items():
        entry = next((one for one in file.model.metadata_props if one.key == key), None)
        entry = entry or file.model.metadata_props.add(key=key)
        entry.value = text
    try:
        out.write_bytes(file.model.SerializeToString())
    except ValueError as error:  # protobuf's limit
        raise ArtifactError(f"{out.name} cannot be written as one protobuf file: {error}") from error
    return dropped


def _unread(file: OnnxFile, name: str, tensor: Any) -> bool:
    """An initializer that is neither read, nor an output, nor an input's default."""
    read = name in file.main.readers or name in file.main.outputs or name in file.main.inputs
    return not read and name not in file.main.makers and name == tensor.name


def _bytes(values: Tensor) -> bytes:
    import torch

    content: bytes = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return content


def _append(file: OnnxFile, tensor: Any, new: bytes | None, target: BinaryIO) -> tuple[int, int]:
    """Write one tensor's data behind the last; returns offset and bytes (rule 2)."""
    import numpy as np

    offset = -(-target.tell() // _ALIGNMENT) * _ALIGNMENT
    target.write(bytes(offset - target.tell()))
    if new is not None:
        target.write(new)
        return offset, len(new)
    source, start, nbytes = file.span(tensor)
    if nbytes:
        mapped = np.memmap(source, np.uint8, "r", start, (nbytes,))
        for at in range(0, nbytes, _CHUNK):
            target.write(mapped[at : at + _CHUNK].data)
    return offset, nbytes


def _replace(tensor: Any, new: bytes) -> None:
    for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
        tensor.ClearField(field)
    tensor.raw_data = new


def _move(tensor: Any, location: str, offset: int, nbytes: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", nbytes)):
        tensor.external_data.add(key=key, value=str(value))
