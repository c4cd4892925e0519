"""Write a Hugging Face folder of a frozen program, shard by shard."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sparsec import _fx, mapping
from sparsec.backend import Emitted
from sparsec.backends.hf.card import inherited
from sparsec.backends.hf.model import Skeleton, pretrained, skeleton
from sparsec.errors import GraphError, UsageError
from sparsec.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.sites import Site

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
CONFIG_VERSION = 1
COPIED = """
    tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.txt vocab.json merges.txt
    spiece.model sentencepiece.bpe.model tokenizer.model source.spm target.spm bpe.codes normalizer.json
    chat_template.jinja chat_template.json preprocessor_config.json processor_config.json video_preprocessor_config.json
    generation_config.json modules.json sentence_bert_config.json config_sentence_transformers.json
    1_Pooling/config.json
""".split()
"""What is taken from the origin besides: data that tokenizers, processors and sentence-transformers read. No code."""


def write(program: Program, folder: Path, shard_bytes: int) -> Emitted:
    """Write the folder. Raises UsageError where the program is not frozen, GraphError where it is not the model's."""
    if "frozen" not in program.facts or program.facts & {"masked", "lowered"}:
        found = ", ".join(sorted(program.facts))
        raise UsageError(
            f"the hf backend takes a frozen program that is not lowered, found {found}; end the passes with freeze"
        )
    origin, class_name = Path(program.origin["folder"]), str(program.origin["class"])
    folder.mkdir()
    dtype = _main_dtype(program)
    head = program.origin.get("head", {})  # of a task: the origin's folder may hold another one, or none
    parts = _Parts(program, origin, class_name, dtype, head)
    shards = list(_shards(parts, shard_bytes))
    hashes: dict[str, str] = {}
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else SINGLE
        tensors = {name: parts.read(name) for name in names}
        save_file(tensors, folder / file, {"format": "pt"})
        hashes |= {name: sha256(tensor) for name, tensor in tensors.items()}
        index |= dict.fromkeys(names, file)
        mapping.release(*tensors.values())
    if len(shards) > 1:
        total = sum(map(parts.nbytes, index))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n")
    (folder / CONFIG).write_text(json.dumps(_config(program, origin, class_name, dtype), indent=2) + "\n")
    _copy_others(origin, folder)
    sparse = sum(_fx.get_tensor(program.module, site.name).nbytes for site in program.sites.sparse)
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    facts = {"class": class_name, "dtype": dtype, "shards": len(shards), "left_out": parts.left_out}
    facts |= {"tied": parts.tied, "sha256": hashes, "card": inherited(origin)}
    return Emitted(sparse, nbytes, facts)


def sha256(tensor: Tensor) -> str:
    """Hex SHA-256 of a tensor's values, bit for bit."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _main_dtype(program: Program) -> str:
    """The type of most floating-point parameters, by size."""
    sizes: Counter[str] = Counter()
    for parameter in program.module.parameters():
        if parameter.is_floating_point():
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return sizes.most_common(1)[0][0]


class _Parts:
    """Every tensor of the model's state: the program's, or else the origin's."""

    def __init__(self, program: Program, origin: Path, class_name: str, dtype: str, head: Mapping[str, Any]) -> None:
        self._module = program.module
        self._dtype: torch.dtype = getattr(torch, dtype)
        known: Skeleton = skeleton(origin, class_name, head)
        self._in_program: dict[str, str] = {}
        for stored, names in known.names.items():
            found = next((name for name in names if _fx.has_tensor(self._module, name)), None)
            if found is not None:
                self._in_program[stored] = found
        read = {name for stored in self._in_program for name in known.names[stored]}
        unknown = [name for name, _ in self._module.named_parameters() if name not in read]
        if unknown:
            raise GraphError(f"{class_name} has no parameter {unknown[0]}: the program is not of the model it names")
        rest = [name for name in known.shapes if name not in self._in_program]
        self._others = _of_origin(rest, known, origin, class_name, dtype)
        self.tied = {stored: list(names) for stored, names in known.names.items() if len(names) > 1}
        self.names = [name for name in known.shapes if name in self._in_program or name in self._others]
        self.left_out = [name for name in rest if name not in self._others]
        """Names that the origin's files do not hold either."""
        for name in self.names:
            if tuple(self._tensor(name).shape) != known.shapes[name]:
                expected, found_shape = known.shapes[name], tuple(self._tensor(name).shape)
                raise GraphError(f"{name}: {class_name} expects the shape {expected}, found {found_shape}")

    def _tensor(self, name: str) -> Tensor:
        if name in self._in_program:
            return _fx.get_tensor(self._module, self._in_program[name]).detach()
        return self._others[name]()

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored. The origin's have the program's floating-point type."""
        tensor = self._tensor(name)
        if name not in self._in_program and tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        return tensor.contiguous()

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor as it is stored, near enough to plan shards by."""
        tensor = self._tensor(name)
        return tensor.numel() * (self._dtype.itemsize if tensor.is_floating_point() else tensor.element_size())


def _of_origin(
    names: list[str], known: Skeleton, origin: Path, class_name: str, dtype: str
) -> dict[str, Callable[[], Tensor]]:
    """Readers of the tensors that the program does not hold (rule 2 of the backend)."""
    files: dict[str, tuple[Path, str]] = {}
    for file in sorted(origin.glob("*.safetensors")) if names else ():
        with safe_open(file, framework="pt") as opened:
            keys = set(opened.keys())
        for stored in names:
            if key := next((name for name in known.names[stored] if name in keys), None):
                files[stored] = file, key
    found: dict[str, Callable[[], Tensor]] = {name: partial(_read, *place) for name, place in files.items()}
    if missing := [name for name in names if name not in files]:
        # Under other names, or in another format: transformers knows how it reads its own files.
        model, loading = pretrained(origin, class_name, dtype)
        state, absent = model.state_dict(), set(loading["missing_keys"])
        there = [name for name in missing if not absent & set(known.names[name])]
        found |= {name: partial(state.__getitem__, name) for name in there}
    return found


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)  # mapped: nothing is read yet
    return tensor


def _shards(parts: _Parts, shard_bytes: int) -> Iterator[list[str]]:
    shard: list[str] = []
    filled = 0
    for name in parts.names:
        nbytes = parts.nbytes(name)
        if shard and filled + nbytes > shard_bytes:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += nbytes
    yield shard


def _config(program: Program, origin: Path, class_name: str, dtype: str) -> dict[str, Any]:
    """The origin's configuration with ours in it (rule 3 of the backend)."""
    config: dict[str, Any] = json.loads((origin / CONFIG).read_text())
    _set_dtype(config, dtype)
    config |= {"architectures": [class_name], "dtype": dtype, **program.origin.get("head", {})}
    sites = {site.name: str(site.pattern) for site in program.sites.sparse}
    weights = [(math.prod(site.shape), _density(program, site)) for site in program.sites.sparse]
    patterns = set(sites.values())
    kept = sum(count * density for count, density in weights)
    config["sparsec_config"] = {
        "version": CONFIG_VERSION,
        "sparsec": __version__,
        "pattern": patterns.pop() if len(patterns) == 1 else None,
        "keep": kept / max(sum(count for count, _ in weights), 1),
        "sites": sites,
    }
    return config


def _density(program: Program, site: Site) -> float:
    """Share of the weights that the pattern keeps; of an intersection, which only bounds it, that is measured."""
    assert site.pattern is not None
    if site.pattern == site.pattern.executable:
        return site.pattern.density
    weight = site.read(program.module)
    return int(weight.count_nonzero()) / weight.numel()


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Transformers loads a folder in the type that its configuration names, in parts too."""
    for key, value in config.items():
        if isinstance(value, dict):
            _set_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and isinstance(value, str):
            config[key] = dtype


def _copy_others(origin: Path, folder: Path) -> None:
    for name in COPIED:
        if (origin / name).is_file():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(origin / name, folder / name)
