"""Checkpoints as other tools wrote them, made without them from the description of their formats.

`FILES` makes what docs/migration.md names, each at its path; what it is made of lies beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_files
import task_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GUIDE = Path(__file__).parents[1] / "docs" / "migration.md"


def bits_of(kept: Tensor) -> Tensor:
    """A mask (..., cols) with eight columns a byte: column c is bit c % 8, from the lowest, of byte c // 8."""
    cols = kept.shape[-1]
    padded = torch.nn.functional.pad(kept.to(torch.int64), (0, -cols % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8)).sum(-1).to(torch.uint8)


def packed24(weight: Tensor) -> dict[str, Tensor]:
    """sparse-24-bitmask: of every 4 columns the 2 of largest magnitude, whatever they are."""
    groups = weight.abs().unflatten(1, (-1, 4))
    kept = torch.zeros(groups.shape, dtype=torch.bool).scatter_(2, groups.topk(2).indices, True).flatten(1)
    values = weight[kept].reshape(len(weight), -1)
    return {"shape": torch.tensor(weight.shape)[:, None], "compressed": values, "bitmask": bits_of(kept)}


def packed(weight: Tensor) -> dict[str, Tensor]:
    """sparse-bitmask: everything that is not zero, in order, and where rows begin."""
    kept = weight != 0
    counts = kept.sum(-1)
    rows = {"row_offsets": counts.cumsum(0) - counts} if weight.dim() > 1 else {}
    return {"shape": torch.tensor(weight.shape), "compressed": weight[kept], "bitmask": bits_of(kept), **rows}


def pruned24(weight: Tensor) -> Tensor:
    """The same weight with the 2 smallest of every 4 columns zero."""
    groups = weight.unflatten(1, (-1, 4))
    return groups.scatter(2, groups.abs().topk(2, largest=False).indices, 0.0).flatten(1)


def blocks(state: dict[str, Tensor]) -> list[str]:
    """The linear weights of a BERT's blocks."""
    return [name for name, value in state.items() if value.dim() == 2 and "layer." in name]


def masked(origin: Path, mask: str = "_weight_mask") -> dict[str, Tensor]:
    """A folder's state with 2:4 masks beside the weights of blocks, under names that end in `mask`."""
    state = load_file(origin / "model.safetensors")
    masks = {name.removesuffix("weight") + mask: pruned24(state[name]) != 0 for name in blocks(state)}
    return {**state, **masks}


def modelopt(origin: Path) -> dict[str, Any]:
    """What modelopt's save writes: masks, and plain data on how they came to be."""
    history = [("sparse_magnitude", {"config": {"nn.Linear": {"*": {}, "*lm_head*": None}}})]
    state = {"modelopt_state_dict": history, "modelopt_version": "0.47.0"}
    return {"modelopt_state": state, "model_state_dict": masked(origin)}


def compressed(
    origin: Path, out: Path, codec: str, where: str = "quantization_config", **config: Any
) -> dict[str, Tensor]:
    """A folder like `origin` whose linear weights in blocks are 2:4 and stored by `codec`; returns its dense state.

    `where`: the part of config.json that says so; `config`: what else that part holds.
    """
    state = load_file(origin / "model.safetensors")
    sites = blocks(state)
    state |= {name: pruned24(state[name]) for name in sites}
    out.mkdir()
    stored = {name: value for name, value in state.items() if name not in sites}
    encode = packed24 if codec == "sparse-24-bitmask" else packed
    for name in sites:
        base = name.removesuffix(".weight") if codec == "sparse-24-bitmask" else name  # older files: with .weight
        stored |= {f"{base}.{key}": part.contiguous() for key, part in encode(state[name]).items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    sparsity = {
        "format": codec,
        "sparsity_structure": "2:4",
        "global_sparsity": 0.4,
        "ignore": [],
        "targets": ["Linear"],
    }
    part = {"sparsity_config": {**sparsity, "registry_requires_subclass": False}, **config}
    data = json.loads((origin / "config.json").read_text())
    data |= part if where == "" else {where: part}
    (out / "config.json").write_text(json.dumps(data))
    for path in origin.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            (out / path.name).write_bytes(path.read_bytes())
    return state


def recipes() -> dict[str, str]:
    """The recipes that the guide shows, by their names."""
    return dict(re.findall(r"`(\S+\.yaml)`[^`]*```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL))


def _base(path: Path) -> Path:
    folder = path.with_name("base-model")
    if not folder.exists():
        task_models.bert(folder, "BertForSequenceClassification")
    return folder


def _pruned(path: Path) -> None:
    state = load_file(_base(path) / "model.safetensors")
    torch.save({name: pruned24(value) if name in blocks(state) else value for name, value in state.items()}, path)


def _adapter(path: Path) -> None:
    path.mkdir()
    lora_files.saved(path, lora_files.pair("bert.encoder.layer.0.attention.self.query", 16, 16))


def _recipe(path: Path) -> None:
    path.write_text(recipes()[path.name])


FILES: dict[str, Callable[[Path], Any]] = {
    "base-model": _base,
    "old-model": lambda p: compressed(_base(p), p, "sparse-24-bitmask", quant_method="compressed-tensors"),
    "sparse.pth": lambda p: torch.save(modelopt(_base(p)), p),
    "asp.pth": lambda p: torch.save(masked(_base(p), "__weight_mma_mask"), p),
    "pruned.pth": _pruned,
    "adapter": _adapter,
    "reviews.csv": lambda p: task_models.sentences(str(p), 16),
    "recipe.yaml": _recipe,
    "gradual.yaml": _recipe,
}
