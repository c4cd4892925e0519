"""The engine's state beside a model that something else saves: `sparsec_engine.safetensors` and `sparsec_engine.json`.

1. With it are the weights that are not pruned yet: the model's own file may hold the pruned ones, which were judged.
2. Hashes are checked before anything is used; no pickle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from sparsec import store
from sparsec.errors import ArtifactError
from sparsec.training.engine import Engine

TENSORS, PLAIN = "sparsec_engine.safetensors", "sparsec_engine.json"
_STATE, _WEIGHT = "state:", "weight:"


def save(engine: Engine, folder: Path) -> None:
    """Write what `load` needs. Raises ArtifactError where it cannot be written."""
    state, plain = engine.state_dict()
    tensors = {f"{_STATE}{name}": value for name, value in state.items()}
    tensors |= {f"{_WEIGHT}{one.site.name}": one.parameter for one in engine.sites if one.selection is None}
    try:
        store.save_tensors(folder / TENSORS, tensors)
    except OSError as error:
        raise ArtifactError(f"{folder / TENSORS} cannot be written: {error.strerror}; free some space") from error
    text = json.dumps(plain, allow_nan=False)
    words = {"tensors": store.sha256(folder / TENSORS), "plain": _hash(text), "state": text}
    store.replace_file(folder / PLAIN, json.dumps(words).encode())


@torch.no_grad()
def load(engine: Engine, folder: Path) -> None:
    """Go on from a saved state, in place of `Engine.begin`; all other weights are the caller's to put back.

    Raises ArtifactError where it is missing or damaged, UsageError where it is of another method or pattern.
    """
    words: Any = store.load_json(folder / PLAIN)
    try:
        text, hashes = words["state"], (words["tensors"], words["plain"])
        found = (store.sha256(folder / TENSORS), _hash(text))
    except (OSError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactError(_damaged(folder, f"{PLAIN} or {TENSORS} cannot be read ({error})")) from error
    if hashes != found:
        raise ArtifactError(_damaged(folder, "the engine's state was changed after it was written (SHA-256 differs)"))
    tensors = store.load_tensors(folder / TENSORS)
    state = {name.removeprefix(_STATE): value for name, value in tensors.items() if name.startswith(_STATE)}
    engine.load_state(state, json.loads(text))
    for one in engine.sites:
        if one.selection is None:
            one.parameter.copy_(tensors[f"{_WEIGHT}{one.site.name}"])


def checkpoint(args: Any, state: Any) -> Path:
    """The folder of the checkpoint that a transformers Trainer writes at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _damaged(folder: Path, what: str) -> str:
    return f"{folder} is damaged: {what}; go on from an earlier checkpoint, or start anew"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
