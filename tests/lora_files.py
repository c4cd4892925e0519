"""Adapter folders as peft writes them, made without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models
from safetensors.torch import save_file
from torch import Tensor

from sparsec.training import adapters


def saved(folder: Path, tensors: dict[str, Tensor], **changed: Any) -> Path:
    """An adapter folder as peft writes it."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "init_lora_weights": True, **changed}
    (folder / adapters.CONFIG).write_text(json.dumps(config))
    save_file({f"base_model.model.{name}.weight": value for name, value in tensors.items()}, folder / adapters.TENSORS)
    return folder


def pair(name: str, rows: int, cols: int, rank: int = 2) -> dict[str, Tensor]:
    """A and B of one module."""
    return {f"{name}.lora_A": models.random(rank, cols, seed=3), f"{name}.lora_B": models.random(rows, rank, seed=4)}
