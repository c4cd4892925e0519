"""The options of `compile` are shorthand for a recipe: here they become one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsec.errors import UsageError
from sparsec.recipe import DEFAULT_PASSES, Recipe, make_pass


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
) -> Recipe:
    """The recipe that the options say: a file's, changed by what else was given."""
    data: dict[str, Any] = Recipe.read(recipe).model_dump() if recipe else {"targets": {}, "passes": DEFAULT_PASSES}
    targets = {**({"*": pattern} if pattern else {}), **dict(_selector(text) for text in layer or [])}
    targets |= dict.fromkeys(ignore or [], "ignore")
    if passes and (score or columns):
        raise UsageError(
            "--score and --columns write the mask pass; with --passes, put them there: mask{columns=l1} | freeze"
        )
    if score or columns:
        options = {key: value for key, value in (("score", score), ("columns", columns)) if value}
        passes = f"{make_pass('mask', options)} | freeze"
    chosen = backend.split(",") if backend else None
    changes = {"model": model, "passes": passes, "seed": seed, "backends": chosen, "values": values}
    data |= {key: value for key, value in changes.items() if value is not None}
    data["targets"] |= targets
    if include_pooler:
        data["include"] = ["pooler"]
    if "model" not in data:
        raise UsageError("compile needs a MODEL: a Hugging Face folder or hub id, module:function, or demo:minilm")
    if not data["targets"] and "pattern=" not in data["passes"]:
        raise UsageError("compile needs a pattern: --pattern 64:2:5, or --layer 're:fc1=2:4', or a --recipe")
    return Recipe.from_data(data)


def _selector(text: str) -> tuple[str, str]:
    selector, equals, pattern = text.rpartition("=")
    if not equals or not selector:
        raise UsageError(f"--layer {text!r}: expected SELECTOR=PATTERN, such as 're:.*fc1=64:2:8'")
    return selector, pattern
