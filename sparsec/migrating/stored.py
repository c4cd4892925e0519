"""Tensors in files, by name, each read when it is asked for: safetensors, and what torch.save wrote.

What torch.save wrote is read with weights_only: a file that asks for more than tensors and plain data is refused.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import store
from sparsec.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

Stored = Mapping[str, Callable[[], "Tensor"]]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
_WITHIN = ("model_state_dict", "state_dict", "model", "module")  # where checkpoints keep a model's tensors, usually
_PARALLEL = "module."  # how DistributedDataParallel begins every name


def of_safetensors(files: Iterable[Path]) -> dict[str, Callable[[], Tensor]]:
    """All tensors of safetensors files. Raises ArtifactError for a damaged file and for a name that stands in two."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} cannot be read: {error}") from error
        if twice := found.keys() & set(names):
            raise ArtifactError(f"{file}: {min(twice)} stands in another file of the folder too; take one of them out")
        found |= {name: partial(_read, file, name) for name in names}
    return found


def _read(file: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: {name} cannot be read: {error}") from error
    return tensor


def of_pickle(file: Path) -> dict[str, Callable[[], Tensor]]:
    """The tensors of a state dict that torch.save wrote, alone or within a checkpoint. No code of it is run.

    Raises UsageError for a file that holds objects of other kinds, ArtifactError for one that is damaged.
    """
    import torch

    try:
        data: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of a damaged file, whatever unpickling raises
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not asked:
            raise ArtifactError(
                f"{file} cannot be read: {(str(error) or repr(error)).splitlines()[0]}; save it again"
            ) from error
        raise UsageError(
            f"{file} holds more than tensors and plain data ({asked[1]}), and reading that could run code; it was not "
            "read. Where it was made, save the state dict alone: torch.save(model.state_dict(), "
            "FILE), or safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from None
    return {name: partial(_given, tensor) for name, tensor in _state(data, file).items()}


def _given(tensor: Tensor) -> Tensor:
    return tensor


def _state(data: Any, file: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in what a file holds."""
    import torch

    for key in _WITHIN:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    tensors = {name: value for name, value in data.items() if torch.is_tensor(value)} if isinstance(data, dict) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise UsageError(
            f"{file} holds no state dict: expected names with tensors, alone or under {', '.join(_WITHIN)}; save it "
            "with torch.save(model.state_dict(), FILE)"
        )
    parallel = all(name.startswith(_PARALLEL) for name in tensors)
    return {name.removeprefix(_PARALLEL) if parallel else name: value for name, value in tensors.items()}


def opened(path: Path) -> Stored:
    """The tensors of a file, or of the safetensors files of a folder, by the names they are stored under."""
    if path.suffix in PICKLED and path.is_file():
        return of_pickle(path)
    return of_safetensors(_files(path) if path.is_dir() else [path])


def _files(folder: Path) -> list[Path]:
    """The files that transformers reads, or else all: some folders hold the same weights in another form too."""
    if (folder / INDEX).is_file():
        index = store.load_json(folder / INDEX)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict):
            raise ArtifactError(f"{folder / INDEX} lists no files: it is damaged")
        return [folder / Path(str(name)).name for name in dict.fromkeys(names.values())]
    return [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
