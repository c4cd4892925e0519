"""Proofs about a Hugging Face folder on disk. Every tensor is read again, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsec import mapping
from sparsec.backend import Check, CheckData, compare
from sparsec.backends.hf.model import HfModule, pretrained
from sparsec.backends.hf.writing import CONFIG, INDEX, SINGLE, sha256
from sparsec.errors import ArtifactError
from sparsec.pattern import Pattern
from sparsec.vnm import violations_alone


def verify(folder: Path, manifest: dict[str, Any], check: CheckData) -> list[Check]:
    """One check for each fact; a fact about many tensors names the first that breaks it."""
    facts = manifest["backends"]["hf"]
    sites = {site["name"]: site for site in manifest["sites"] if site["pattern"]}
    wrong: dict[str, list[str]] = {"weights": [], "patterns": []}
    proven: set[str] = set()
    for name, tensor in tensors(folder):
        if sha256(tensor) != facts["sha256"].get(name):
            wrong["weights"].append(f"{name} is not what was compiled")
        for alias in _names(name, manifest):
            if alias in sites:
                proven.add(alias)
                wrong["patterns"] += _faults(sites[alias], tensor)
        mapping.release(tensor)
    found = {name for name, _ in tensors(folder)}
    wrong["weights"] += [f"{name} is missing" for name in facts["sha256"] if name not in found]
    wrong["patterns"] += [f"{name} is missing" for name in sites if name not in proven]
    decided = all(Pattern.parse(site["pattern"]).decidable for site in sites.values())
    words = "satisfy their pattern bit for bit" if decided else "break no count of their pattern"
    checks = [
        _all("hf: config.json", _config_faults(folder, sites), "declares every site's pattern"),
        _all("hf: patterns", wrong["patterns"], f"{len(sites)} weights {words}"),
        _all("hf: weights", wrong["weights"], f"{len(found)} tensors are the compiled ones, bit for bit"),
    ]
    try:
        model, loading = pretrained(folder, facts["class"], facts["dtype"])
    except ArtifactError as error:
        return [*checks, Check("hf: transformers", False, str(error))]
    faults = _loading_faults(loading, facts["left_out"]) + _state_faults(folder, model)
    checks.append(_all("hf: transformers", faults, f"{facts['class']} loads every tensor as it is stored"))
    with torch.no_grad():
        outputs = HfModule(model, manifest)(**check.inputs)
    mapping.release(*model.parameters())
    checks.append(compare("hf: outputs in transformers", outputs, check.outputs, manifest["tolerance"]))
    return checks


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder's shards, mapped, one at a time. Raises ArtifactError where a shard is damaged."""
    try:
        files = [SINGLE]
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        for file in files:
            with safe_open(folder / Path(file).name, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    yield name, opened.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: the shards cannot be read: {error}") from error


def _names(stored: str, manifest: dict[str, Any]) -> list[str]:
    """The names that a stored tensor has in the program: tied weights are stored once, under any of theirs."""
    names: list[str] = manifest["backends"]["hf"]["tied"].get(stored, [stored])
    return names


def _faults(site: dict[str, Any], tensor: Tensor) -> list[str]:
    view, name = site["view"], site["name"]
    if list(tensor.shape) != list(view["parameter"]):
        return [f"{name}: expected shape {view['parameter']}, found {list(tensor.shape)}"]
    weight = tensor.permute(*view["axes"]).reshape(site["shape"])
    violations = violations_alone(Pattern.parse(site["pattern"]), weight, site.get("moved", False))
    if violations.count:
        return [f"{name}: breaks {site['pattern']}, first at {violations.first[0]} ({violations.count} in all)"]
    negative = int(((weight == 0) & torch.signbit(weight)).sum())
    return [f"{name}: {negative} zeros are -0.0, expected +0.0 only"] if negative else []


def _config_faults(folder: Path, sites: dict[str, Any]) -> list[str]:
    try:
        config = json.loads((folder / CONFIG).read_text())
        declared = config["sparsec_config"]["sites"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"it cannot be read: {error}"]
    quantized = "quantization_config" in config
    faults = ["it has a quantization_config, which transformers would act on"] if quantized else []
    expected = {name: site["pattern"] for name, site in sites.items()}
    different = [name for name in {**expected, **declared} if expected.get(name) != declared.get(name)]
    return faults + [
        f"{name} is declared {declared.get(name, 'dense')}, the manifest says {expected.get(name, 'dense')}"
        for name in different
    ]


def _loading_faults(loading: dict[str, Any], left_out: list[str]) -> list[str]:
    faults = [f"it misses {name}" for name in sorted(set(loading.get("missing_keys", ())) - set(left_out))]
    faults += [f"it does not know {name}" for name in sorted(loading.get("unexpected_keys", ()))]
    return faults + [f"{entry} has another shape" for entry in loading.get("mismatched_keys", ())]


def _state_faults(folder: Path, model: Any) -> list[str]:
    state, faults = model.state_dict(), []
    for name, tensor in tensors(folder):
        loaded = state.get(name)
        same = loaded is not None and loaded.dtype == tensor.dtype and loaded.shape == tensor.shape
        if not (same and sha256(loaded) == sha256(tensor)):
            faults.append(f"{name} is loaded as something else")
        mapping.release(tensor, *([loaded] if same else []))
    return faults


def _all(name: str, faults: list[str], words: str) -> Check:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return Check(name, not faults, f"{faults[0]}{more}" if faults else words)
