"""Hugging Face folders whose weights other tools compressed or masked, as plain ones: dense weights with exact zeros.

1. A plain folder is made beside the system's other temporary files, once in a process, and goes away with it; the
   folder that was given is only read. It takes the room of the dense weights.
2. One tensor is decoded at a time; at most a shard of 1 GB is held.
3. Everything but weights and `config.json` is linked, and the configuration no longer speaks of compression.
"""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import store
from sparsec.errors import ArtifactError, UsageError
from sparsec.migrating.decoding import CODECS, decoded, is_encoded
from sparsec.migrating.stored import INDEX, PICKLED, Stored, opened

if TYPE_CHECKING:
    from torch import Tensor

_CONFIG = "config.json"
_QUANTIZATION, _OURS_TO_DROP = "quantization_config", ("quantization_config", "compression_config", "sparsity_config")
_SHARD_BYTES = 10**9
_made: dict[tuple[Any, ...], Path] = {}  # what was given, with times of change -> the plain folder
_sources: dict[str, str] = {}


def is_compressed(config: Any) -> bool:
    """Whether a config.json, as plain data, speaks of compressed-tensors' sparsity."""
    return _sparsity(config) is not None


def plain(folder: Path, weights: Path | None = None) -> Path:
    """`folder` itself where transformers reads it as it is, else a plain folder of the same model.

    `weights`: a file with other weights, which take the place of the folder's. Raises UsageError for a codec that is
    not known and for weights that are quantized too, ArtifactError for damaged files.
    """
    if weights is None and _is_plain(folder):
        return folder
    config = store.load_json(folder / _CONFIG)
    if weights is None and (sparsity := _sparsity(config)):
        _check(folder, config, sparsity)
    stored = opened(weights or folder)
    files = [weights] if weights else [folder / _CONFIG, *folder.glob("*.safetensors")]
    key = (folder.absolute(), *((file.absolute(), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    if key not in _made:
        _made[key] = _write(folder, config, stored)
        _sources[str(_made[key])] = str(folder)
    return _made[key]


def _is_plain(folder: Path) -> bool:
    """Whether transformers is to read it: also where it will say what is wrong with it."""
    try:
        return _sparsity(store.load_json(folder / _CONFIG)) is None and not is_encoded(opened(folder))
    except ArtifactError:
        return True


def source_of(folder: str) -> str:
    """The folder that a plain one was made from; any other is its own."""
    return _sources.get(folder, folder)


def _sparsity(config: Any) -> dict[str, Any] | None:
    """The part of a configuration that says how zeros were compressed."""
    for part in (config, *(config.get(key) for key in _OURS_TO_DROP)) if isinstance(config, dict) else ():
        if isinstance(part, dict) and isinstance(part.get("sparsity_config"), dict) and part["sparsity_config"]:
            found: dict[str, Any] = part["sparsity_config"]
            return found
    return None


def _check(folder: Path, config: dict[str, Any], sparsity: dict[str, Any]) -> None:
    codec = str(sparsity.get("format"))
    if codec not in CODECS:
        raise UsageError(
            f"{folder / _CONFIG}: the weights are stored by the codec {codec!r}; sparsec reads {', '.join(CODECS)}. "
            "Have the tool that wrote it save the model uncompressed, or start from the checkpoint before it"
        )
    for part in (config.get("compression_config"), config.get(_QUANTIZATION)):
        inner = part.get(_QUANTIZATION, part) if isinstance(part, dict) else None
        if isinstance(inner, dict) and inner.get("config_groups"):
            raise UsageError(
                f"{folder / _CONFIG}: the weights are not only {codec} but quantized too ({inner.get('format')}); "
                "start from the checkpoint that was pruned and not quantized; --values int8 makes small weights of it"
            )


def _write(folder: Path, config: dict[str, Any], stored: Stored) -> Path:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    index: dict[str, str] = {}
    try:
        out = Path(tempfile.mkdtemp(prefix="sparsec-"))
        atexit.register(shutil.rmtree, out, ignore_errors=True)  # rule 1
        for number, tensors in enumerate(_shards(decoded(stored))):
            file = f"model-{number:05}.safetensors"
            if twice := index.keys() & tensors.keys():
                raise ArtifactError(f"{folder}: {min(twice)} is stored twice, once compressed; take one of them out")
            save_file(tensors, out / file, {"format": "pt"})
            index |= dict.fromkeys(tensors, file)
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
        rest = {key: value for key, value in config.items() if key not in _OURS_TO_DROP}
        (out / _CONFIG).write_text(json.dumps(rest))
        for path in folder.iterdir():
            if path.name not in (_CONFIG, INDEX) and path.suffix not in (".safetensors", *PICKLED):
                (out / path.name).symlink_to(path.absolute())
    except (OSError, SafetensorError) as error:  # safetensors' writer reports a full disk as its own type
        reason = getattr(error, "strerror", None) or str(error)
        raise ArtifactError(
            f"{folder} could not be decoded to a temporary folder: {reason}; free some space, or set TMPDIR to a "
            "folder on a larger disk"
        ) from error
    return out


def _shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of at most a shard's size, or of one; memory that is shared is copied."""
    shard: dict[str, Tensor] = {}
    seen: set[int] = set()
    filled = 0
    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, seen, filled = {}, set(), 0
        memory = tensor.untyped_storage().data_ptr()
        shard[name] = tensor.clone() if memory in seen else tensor.contiguous()
        seen.add(memory)
        filled += tensor.nbytes
    if shard:
        yield shard
