"""LoRA adapters that peft wrote, merged into a program's weights: W + scale B A, and exact zeros where W is pruned.

Modules that peft trained whole beside it (`modules_to_save`), such as a new head, take the place of the program's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsec import _fx, store
from sparsec.errors import ArtifactError, UsageError
from sparsec.program import Program
from sparsec.selection import kept_only
from sparsec.sites import Site

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin that peft takes off the base weights


@dataclass(frozen=True)
class Adapter:
    """Of each module, by its name in the model: A (rank, inputs), B (outputs, rank) and what their product is times."""

    parts: Mapping[str, tuple[Tensor, Tensor, float]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    """Of modules that were trained whole, each parameter by its name in the model."""


def read(folder: str | Path) -> Adapter:
    """Read a folder that peft's `save_pretrained` wrote. Neither peft nor any code of the folder is needed.

    Raises ArtifactError where files are missing or damaged, UsageError for adapters that are not plain LoRA.
    """
    place = Path(folder)
    config: Any = store.load_json(place / CONFIG)
    if not isinstance(config, dict):
        raise ArtifactError(f"{place / CONFIG} is no adapter configuration: save the adapter with peft again")
    if str(config.get("peft_type")) != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type")
        raise UsageError(f"the adapter in {place} is {kind}; only LoRA, W + scale B A, can be merged: train a LoRA")
    began = str(config.get("init_lora_weights", True)).lower()
    if began.startswith(_CHANGES_BASE):
        raise UsageError(
            f"the adapter in {place} began as {began}, which changed the weights it belongs to, so it does not fit the "
            "model's own; convert it to plain LoRA first (peft: path_initial_model_for_weight_conversion)"
        )
    tensors = store.load_tensors(place / TENSORS)
    saved = [f".{name}." for name in config.get("modules_to_save") or ()]
    whole = {name for name in tensors if any(part in name for part in saved)}
    given = {name.removeprefix(_PREFIX): tensors.pop(name) for name in whole}
    modules = sorted({name.removesuffix(_A) for name in tensors if name.endswith(_A)})
    expected = {module + end for module in modules for end in (_A, _B)}
    if not modules or expected != tensors.keys():
        odd = sorted(expected ^ tensors.keys())
        raise UsageError(
            f"{place / TENSORS} should hold {_A[1:]} and {_B[1:]} of each module and nothing else, but "
            f"{', '.join(odd[:3]) or 'any of them'} is missing or more than that; merge biases and embeddings with "
            "peft first, or train without them"
        )
    parts = {}
    for module in modules:
        name, a, b = module.removeprefix(_PREFIX), tensors[module + _A].float(), tensors[module + _B].float()
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise ArtifactError(f"{place / TENSORS}: the adapter of {name} has numbers that are not finite")
        parts[name] = (a, b, _scale(config, name, len(a)))
    return Adapter(parts, given)


@torch.no_grad()
def merge(program: Program, adapter: Adapter) -> list[str]:
    """Add an adapter to the weights in place: the program must own them. Returns the names of the sites.

    A selected site gets where(mask, W + scale B A, 0): its zeros stay. Raises UsageError, before anything is written,
    for a module that is no site of the program, for shapes that do not fit and a rank beyond them.
    """
    changed, whole = [], replaced(program, adapter)
    for site, weight in merged(program, adapter):
        _fx.get_tensor(program.module, site.name).detach().copy_(site.view.to_parameter(weight))
        changed.append(site.name)
    for name, tensor in whole.items():
        _fx.get_tensor(program.module, name).detach().copy_(tensor)
    return changed


def replaced(program: Program, adapter: Adapter) -> dict[str, Tensor]:
    """What takes the place of parameters, by name; a selected site keeps its zeros. Raises UsageError as `merge`."""
    sites = {site.name: site for site in program.sites}
    found = {}
    for name, tensor in adapter.whole.items():
        own = _fx.get_tensor(program.module, name) if _fx.has_tensor(program.module, name) else None
        if own is None or own.shape != tensor.shape:
            held = "has none of this name" if own is None else f"has it as {list(own.shape)}"
            raise UsageError(
                f"the adapter replaces {name}, {list(tensor.shape)}, and this model {held}; name the model with the "
                "head that it was trained on"
            )
        tensor = tensor.to(own.device, own.dtype)
        if name in sites:
            tensor = sites[name].view.to_parameter(_kept(sites[name], sites[name].view.to_matrices(tensor)))
        found[name] = tensor
    return found


def merged(program: Program, adapter: Adapter) -> Iterator[tuple[Site, Tensor]]:
    """The sites that an adapter changes, and their new weights (batch, rows, cols); see `merge`."""
    if "permuted" in program.facts:
        raise UsageError(
            "the model's channels are permuted, and the adapter belongs to the order they had before: merge it before "
            "permute"
        )
    sites = {name: site for site in program.sites for name in (site.name, *site.aliases)}
    if unknown := [name for name in adapter.parts if f"{name}.weight" not in sites]:
        raise UsageError(
            f"the adapter changes {', '.join(unknown[:3])}{' and others' if len(unknown) > 3 else ''}, no layer of "
            f"this model that can be merged; the model has {', '.join(list(sites)[:3])}, ...: give the adapter that "
            "was trained on this model, without embeddings"
        )
    found = [(sites[f"{name}.weight"], *part) for name, part in adapter.parts.items()]
    for site, a, b, _ in found:
        batch, rows, cols = site.shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or (len(b), a.shape[1]) != (batch * rows, cols):
            raise UsageError(
                f"{site.name} has {batch * rows} outputs and {cols} inputs, the adapter A {tuple(a.shape)} and B "
                f"{tuple(b.shape)}; expected (rank, {cols}) and ({batch * rows}, rank): it is of another model"
            )
        if len(a) > min(batch * rows, cols):
            raise UsageError(
                f"{site.name} has {batch * rows} outputs and {cols} inputs, and the adapter's rank is {len(a)}; "
                f"expected at most {min(batch * rows, cols)}: no change of this matrix has a higher one, so train the "
                "adapter anew with a lower rank"
            )
    for site, a, b, scale in found:
        product = (b @ a).mul_(scale).reshape(site.shape)
        weight = site.read(program.module)
        yield site, _kept(site, weight + product.to(weight.device, weight.dtype))


def _kept(site: Site, weight: Tensor) -> Tensor:
    if site.selection is None or site.pattern is None:
        return weight
    mask = site.pattern.mask(site.selection, site.shape[2])
    return kept_only(weight, mask.to(weight.device))


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or over its root (rsLoRA); alpha may be another for some modules, which peft names by a regex."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), config.get("lora_alpha"))
    if not isinstance(alpha, int | float):
        raise ArtifactError(f"{CONFIG}: lora_alpha is {alpha!r}; expected a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
