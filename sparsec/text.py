"""Offline English text for calibration and quality checks: docstrings of the Python standard library."""

from __future__ import annotations

import ast
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError

if TYPE_CHECKING:
    import random

    from torch import Tensor

_MODULES = """
    argparse asyncio.tasks decimal difflib email.message functools heapq inspect json logging pathlib random re shutil
    socketserver statistics subprocess tempfile textwrap threading unittest.case urllib.request
    """.split()
_NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
_SHORTEST = 100  # characters of a docstring worth reading
_HEAD = 100  # characters that tell a passage from others


def passages() -> list[str]:
    """Docstrings of modules, classes and functions, long ones first within a module; the same on every call.

    They are held out for quality checks: `docstrings` gives none of them.
    """
    found: list[str] = []
    for name in _MODULES:
        module = importlib.import_module(name)
        members = [getattr(module, key) for key in sorted(vars(module)) if not key.startswith("_")]
        documented = [module, *(m for m in members if getattr(m, "__module__", None) == name)]
        texts = {" ".join(m.__doc__.split()) for m in documented if isinstance(m.__doc__, str)}
        found += sorted((text for text in texts if len(text) > 200), key=lambda text: (-len(text), text))
    return found


def docstrings(order: random.Random) -> Iterator[str]:
    """All docstrings of the standard library that share no text with `passages`, file by file, in a random order.

    About 1.3 MB. Files are parsed, not imported, as they are needed. Raises UsageError where Python has no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(root.rglob("*.py")) if not _NO_LIBRARY & set(file.relative_to(root).parts)]
    if not files:
        raise UsageError(f"the Python standard library has no source files in {root}; name other data with --calib")
    order.shuffle(files)
    held_out = passages()
    everything, seen = "\n".join(held_out), set[str]()
    for file in files:
        for text in _docstrings_of(file):
            shared = text in everything or any(held[:_HEAD] in text for held in held_out)
            if text not in seen and not shared:
                seen.add(text)
                yield text


def _docstrings_of(file: Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old escapes in strings
        tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (found := ast.get_docstring(node, clean=False)):
            text = " ".join(found.split())
            if len(text) > _SHORTEST:
                yield text


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
