"""Offline English text for calibration and quality checks: docstrings of the Python standard library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_MODULES = """
    argparse asyncio.tasks decimal difflib email.message functools heapq inspect json logging pathlib random re shutil
    socketserver statistics subprocess tempfile textwrap threading unittest.case urllib.request
    """.split()


def passages() -> list[str]:
    """Docstrings of modules, classes and functions, long ones first within a module; the same on every call."""
    found: list[str] = []
    for name in _MODULES:
        module = importlib.import_module(name)
        members = [getattr(module, key) for key in sorted(vars(module)) if not key.startswith("_")]
        documented = [module, *(m for m in members if getattr(m, "__module__", None) == name)]
        texts = {" ".join(m.__doc__.split()) for m in documented if isinstance(m.__doc__, str)}
        found += sorted((text for text in texts if len(text) > 200), key=lambda text: (-len(text), text))
    return found


def batches(tokenizer: Any, names: list[str], count: int, length: int) -> tuple[dict[str, Tensor], ...]:
    """`count` passages of `length` tokens, as batches of 4, with the inputs `names` that the model takes."""
    import torch

    long_enough = []
    for passage in passages():
        ids = tokenizer(passage, truncation=True, max_length=length)["input_ids"]
        if len(ids) == length:
            long_enough.append(ids)
        if len(long_enough) == count:
            break
    result = []
    for ids in torch.tensor(long_enough).split(4):
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        made["decoder_input_ids"] = ids[:, : length // 2]
        result.append({name: made[name] for name in names})
    return tuple(result)
