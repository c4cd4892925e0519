"""The options of `compile` are shorthand for a recipe: here they become one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from sparsec.errors import UsageError
from sparsec.layout import Values
from sparsec.recipe import DEFAULT_PASSES, Recipe, make_pass

_OUTSIDE_BRACES = re.compile(r",(?![^{]*\})")


def recipe_of(
    model: str | None,
    pattern: str | None,
    layer: list[str] | None,
    ignore: list[str] | None,
    include_pooler: bool,
    recipe: Path | None,
    passes: str | None,
    score: str | None,
    columns: str | None,
    backend: str | None,
    seed: int | None,
    values: str | None = None,
    tokens: str | None = None,
    drop_slow: bool = False,
    onnx_weights: str | None = None,
) -> Recipe:
    """The recipe that the options say: a file's, changed by what else was given."""
    data: dict[str, Any] = Recipe.read(recipe).model_dump() if recipe else {"targets": {}, "passes": DEFAULT_PASSES}
    targets = targets_of(pattern, layer, ignore)
    if passes and (score or columns):
        raise UsageError(
            "--score and --columns write the mask pass; with --passes, put them there: mask{columns=l1} | freeze"
        )
    if score or columns:
        options = {key: value for key, value in (("score", score), ("columns", columns)) if value}
        passes = f"{make_pass('mask', options)} | freeze"
    chosen = _OUTSIDE_BRACES.split(backend) if backend else None
    changes = {"model": model, "passes": passes, "seed": seed, "backends": chosen, "values": values}
    changes |= {"tokens": tokens, "drop_slow": drop_slow or None}
    data |= {key: value for key, value in changes.items() if value is not None}
    data["targets"] |= targets
    if onnx_weights:
        data["backends"] = [_with_weights(text, onnx_weights) for text in data.get("backends", ())]
        if not any(text.startswith("onnx{") for text in data["backends"]):
            raise UsageError("--onnx-weights says how the onnx backend writes weights; add --backend kernel,onnx")
    if include_pooler:
        data["include"] = ["pooler"]
    if "model" not in data:
        raise UsageError("compile needs a MODEL: a Hugging Face folder or hub id, module:function, or demo:minilm")
    if not data["targets"] and "pattern=" not in data["passes"]:
        raise UsageError("compile needs a pattern: --pattern 64:2:5, or --layer 're:fc1=2:4', or a --recipe")
    return Recipe.from_data(data)


def _with_weights(backend: str, weights: str) -> str:
    return f"onnx{{weights={weights}}}" if backend.partition("{")[0] == "onnx" else backend


def targets_of(pattern: str | None, layer: list[str] | None, ignore: list[str] | None) -> dict[str, str]:
    """The targets that --pattern, --layer and --ignore say, in this order: later ones win."""
    targets = {**({"*": pattern} if pattern else {}), **dict(_selector(text) for text in layer or [])}
    return targets | dict.fromkeys(ignore or [], "ignore")


def token_counts(text: str) -> tuple[int, ...]:
    """`1,32,128` as numbers."""
    counts = [int(part) if part.strip().isascii() and part.strip().isdigit() else 0 for part in text.split(",")]
    if min(counts) < 1:
        raise UsageError(f"--tokens {text!r}: expected numbers from 1 up, such as 1,32,128")
    return tuple(dict.fromkeys(counts))


def values_of(text: str) -> Values:
    """What sparse weights are stored as."""
    known: dict[str, Values] = {name: name for name in get_args(Values)}
    if text not in known:
        raise UsageError(f"--values {text!r}: expected {', '.join(known)}")
    return known[text]


def _selector(text: str) -> tuple[str, str]:
    selector, equals, pattern = text.rpartition("=")
    if not equals or not selector:
        raise UsageError(f"--layer {text!r}: expected SELECTOR=PATTERN, such as 're:.*fc1=64:2:8'")
    return selector, pattern
