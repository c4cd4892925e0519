"""What `compile` may be asked for an .onnx file: patterns, and how columns are chosen. The rest is refused."""

from __future__ import annotations

from typing import Any

from sparsec import registry
from sparsec.columns import Solver
from sparsec.errors import PatternError, UsageError
from sparsec.onnxfile.opened import SUFFIX
from sparsec.pattern import Pattern
from sparsec.recipe import WITHOUT_DATA, Recipe, parse_passes

BACKEND = "onnx{weights=dense}"
_NEEDS_MODEL = "compile the PyTorch model that the file was made from, or leave it out"


def is_onnx(model: str) -> bool:
    """Whether MODEL text names an .onnx file."""
    return model.endswith(SUFFIX)


def resolved(recipe: Recipe) -> tuple[Recipe, Solver]:
    """The recipe with its passes and backend named, and how columns are chosen. UsageError for what it cannot mean."""
    onnx = ("onnx", "onnx{}", BACKEND)
    if others := [text for text in recipe.backends if text.replace(" ", "") not in onnx]:
        raise UsageError(
            f"{recipe.model}: an {SUFFIX} file is pruned to an {SUFFIX} file with zeros in place, by --backend onnx; "
            f"found --backend {','.join(others)}, which needs a graph of PyTorch: {_NEEDS_MODEL}"
        )
    if reason := registry.backend("onnx").unavailable():
        raise UsageError(f"backend onnx cannot be used here: {reason}")
    asked = {
        "--values": recipe.values != "fp32",
        "--dtype": recipe.dtype != "fp32",
        "--tokens": recipe.tokens,
        "--drop-slow": recipe.drop_slow,
        "--calib": recipe.calib,
        "--text-columns": recipe.text_columns,
        "--train": recipe.train,
        "--eval": recipe.eval,
        "--task": recipe.task,
        "--label-column": recipe.label_column,
    }
    if wrong := [option for option, given in asked.items() if given]:
        raise UsageError(
            f"{recipe.model}: {wrong[0]} needs a model that sparsec can trace, and an {SUFFIX} file is only pruned by "
            f"magnitude: {_NEEDS_MODEL}"
        )
    passes = parse_passes(recipe.passes or WITHOUT_DATA)
    mask: Any = passes[0]
    plain = [one.name for one in passes] == ["mask", "freeze"] and not mask.pattern and mask.normalise == "none"
    if not plain or mask.score != "magnitude":
        raise UsageError(
            f"{recipe.model}: an {SUFFIX} file is pruned by magnitude, without data: expected the passes "
            f"'mask | freeze' (--columns goes with them), found {recipe.passes!r}; for other scores, "
            f"solvers and passes {_NEEDS_MODEL}"
        )
    for text in recipe.targets.values():
        if text != "ignore" and not Pattern.parse(text).decidable:
            raise PatternError(
                f"{text} cannot be proven from weights alone, and an {SUFFIX} file has no place for its tables; choose "
                f"{text.replace('@strip', '')}"
            )
    if not recipe.targets:
        raise UsageError(f"{recipe.model}: compile needs a pattern: --pattern 2:4, or --layer 're:fc1=2:4'")
    columns: Solver = mask.columns
    return recipe.model_copy(update={"passes": " | ".join(map(str, passes)), "backends": (BACKEND,)}), columns
