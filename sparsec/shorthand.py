"""The options of `compile` are shorthand for a recipe: here they become one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sparsec.errors import UsageError
from sparsec.intersection import joined
from sparsec.layout import Values
from sparsec.methods import Training
from sparsec.onnxrequest import BACKEND as ONNX_BACKEND
from sparsec.onnxrequest import is_onnx
from sparsec.pattern import NM, VNM, Pattern
from sparsec.recipe import DEFAULT_PASSES, PERMUTE, WITH_DATA, Recipe, make_pass, name_and_options, parse_passes

_NEEDS = {"tensorrt": "2:4", "torch24": "2:4"}
"""What --pattern and --layer must imply for a backend to be of use; it is added where they do not."""
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
    dtype: str | None = None,
    calib: str | None = None,
    num_calibration_samples: int | None = None,
    max_seq_length: int | None = None,
    text_columns: str | None = None,
    target_speedup: float | None = None,
    solver: str | None = None,
    also: str | None = None,
    train: str | None = None,
    evaluation: str | None = None,
    label_column: str | None = None,
    task: str | None = None,
    training: Training | None = None,
    permute: str | None = None,
    bias: str | None = None,
    weights: str | None = None,
) -> Recipe:
    """The recipe that the options say: a file's, changed by what else was given."""
    none = {"targets": {}, "passes": DEFAULT_PASSES}
    data: dict[str, Any] = Recipe.read(recipe, model).model_dump() if recipe else none
    targets = targets_of(pattern, layer, ignore)
    if passes and (score or columns or solver):
        raise UsageError(
            "--score, --columns and --solver write the pruning pass; with --passes, put them there: "
            "mask{score=wanda, columns=l1} | freeze, or oneshot{solver=alps}"
        )
    training = training or Training()
    if passes and training.given:
        raise UsageError(
            f"{training.given[0]} writes the training pass; with --passes, put it there: admm{{epochs=3, lr=5e-5}}"
        )
    passes = passes or training.passes(_pruning(score, columns, solver), task or data.get("task", ""))
    chosen = _OUTSIDE_BRACES.split(backend) if backend else None
    if not chosen and not recipe and is_onnx(model or ""):
        chosen = [ONNX_BACKEND]  # an .onnx file becomes an .onnx file, and nothing else
    changes = {"model": model, "passes": passes, "seed": seed, "backends": chosen, "values": values}
    changes |= {"tokens": tokens, "drop_slow": drop_slow or None, "dtype": dtype}
    changes |= {"calib": calib, "num_calibration_samples": num_calibration_samples, "max_seq_length": max_seq_length}
    changes |= {"text_columns": text_columns.split(",") if text_columns else None}
    changes |= {"train": train, "eval": evaluation, "label_column": label_column, "task": task, "bias": bias}
    changes |= {"weights": weights}
    data |= {key: value for key, value in changes.items() if value is not None}
    if training.method and not data.get("train") and "data" not in name_and_options(training.method, "method")[1]:
        raise UsageError(
            f"--method {training.method} trains: add --train DATA, such as glue/sst2 or a .csv with a column label; "
            "with --teacher it may be text without labels, and 'none' the --task"
        )
    needed = next((_NEEDS[name] for name in map(_name, data.get("backends", ())) if name in _NEEDS), None)
    if needed and not also:
        targets = _with_also(targets, needed, [NM, VNM])
    data["targets"] |= targets
    if also:
        data["targets"] = _with_also(data["targets"], also)
        if not data["targets"] and target_speedup is None:
            raise UsageError(f"--also {also} adds to --pattern, --layer and --target-speedup; found none of them")
    if onnx_weights:
        data["backends"] = [_with_weights(text, onnx_weights) for text in data.get("backends", ())]
        if not any(text.startswith("onnx{") for text in data["backends"]):
            raise UsageError("--onnx-weights says how the onnx backend writes weights; add --backend kernel,onnx")
    if target_speedup is not None:
        data["passes"] = _with_choice(data, pattern, target_speedup, also or needed)
    if permute and permute != "none":
        data["passes"] = _with_permutation(data["passes"], permute)
    if include_pooler:
        data["include"] = ["pooler"]
    if "model" not in data:
        raise UsageError("compile needs a MODEL: a Hugging Face folder or hub id, module:function, or demo:minilm")
    if not data["targets"] and not re.search("pattern=|choose-vm|adopt", data["passes"]):
        raise UsageError(
            "compile needs a pattern: --pattern 64:2:5, --layer 're:fc1=2:4', --target-speedup 1.5, or a --recipe"
        )
    return Recipe.from_data(data)


def _pruning(score: str | None, columns: str | None, solver: str | None) -> str | None:
    """The pass text of --score, --columns and --solver; None where none of them is given."""
    options = {key: value for key, value in (("score", score), ("columns", columns)) if value}
    if solver is None or solver == "none":
        return f"{make_pass('mask', options)} | freeze" if options or solver else None
    if options and solver != "refit":
        raise UsageError(
            f"--solver {solver} chooses weights by what they cost; --score and --columns go with --solver refit or none"
        )
    return str(make_pass("oneshot", {"solver": solver, **options}))


def _with_choice(data: Mapping[str, Any], pattern: str | None, speedup: float, also: str | None) -> str:
    """The passes, with one before them that chooses patterns; --layer and --ignore go before the choice."""
    if pattern:
        raise UsageError("--pattern says what --target-speedup is to choose; give one of them (--layer goes with both)")
    if "choose-vm" in data["passes"]:
        raise UsageError(
            "--target-speedup adds a choose-vm pass, and the passes have one already; leave one of them out"
        )
    passes, options = data["passes"] or WITH_DATA, dict[str, Any](speedup=speedup)
    if "oneshot" in passes:  # which looks at calibration data anyway
        options["objective"] = "reconstruction"
    if str(data.get("tokens", "")).isdigit():
        options["tokens"] = data["tokens"]
    if also:
        options["also"] = also
    return f"{make_pass('choose-vm', options)} | {passes}"


def _with_permutation(passes: str, mode: str) -> str:
    """The passes, with one that permutes channels once patterns are chosen and before anything else."""
    made = parse_passes(passes) if passes else ()
    names = [one.name for one in made]
    if PERMUTE in names:
        raise UsageError(f"--permute {mode} adds a permute pass, and the passes have one; leave one of them out")
    at = names.index("choose-vm") + 1 if "choose-vm" in names else 0
    return " | ".join(map(str, [*made[:at], make_pass(PERMUTE, {"mode": mode}), *made[at:]]))


def _with_also(targets: Mapping[str, str], also: str, kinds: Sequence[type[Pattern]] = ()) -> dict[str, str]:
    """Targets that follow the N:M pattern `also` too; of certain kinds only, where some are named."""
    found = dict(targets)
    for selector, text in targets.items():
        if text != "ignore" and (not kinds or isinstance(Pattern.parse(text), tuple(kinds))):
            found[selector] = joined(text, also)
    return found


def _name(backend: str) -> str:
    return backend.partition("{")[0].strip()


def _with_weights(backend: str, weights: str) -> str:
    if _name(backend) != "onnx":
        return backend
    options = [option.strip() for option in backend.partition("{")[2].rstrip("} ").split(",")]
    others = [option for option in options if option and option.partition("=")[0].strip() != "weights"]
    return f"onnx{{{', '.join([f'weights={weights}', *others])}}}"


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
