"""Recipes of llm-compressor and SparseML, turned into the data of sparsec's own.

1. Their N:M says how many weights are pruned; a pattern says how many are kept. Every pattern is told in words.
2. `targets` and `ignore` name modules, from the beginning of the name; selectors are searched in parameters' names.
3. A modifier or option that sparsec has no counterpart for is an error; one that changes no result is left out.
4. YAML tags are names and plain data: nothing is made of them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsec.errors import RecipeError
from sparsec.migrating.selectors import selectors_of
from sparsec.pattern import Pattern
from sparsec.strict_yaml import strict_loader

log = logging.getLogger("sparsec")
_FOREIGN = re.compile(r"""(?:^|[{,])\s*(["']?)(?:\w+_stage|(?:\w+_)?modifiers)\1\s*:""", re.MULTILINE)
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_PYTHON = "tag:yaml.org,2002:python/"
_ONESHOT = {"SparseGPTModifier": "oneshot{solver=sparsegpt%s}", "WandaPruningModifier": "oneshot{solver=none}"}
_MAGNITUDE = ("MagnitudePruningModifier", "GMPruningModifier")
_CONSTANT, _EPOCHS = "ConstantPruningModifier", "EpochRangeModifier"
SUPPORTED = (*_ONESHOT, *_MAGNITUDE, _CONSTANT, _EPOCHS)
_ROUNDING = 0.01  # 0.33 is written for 1:3
_OPTIONS = {
    "sparsity", "mask_structure", "mask_type", "targets", "params", "ignore", "dampening_frac", "percdamp",
    "init_sparsity", "final_sparsity", "start", "end", "start_epoch", "end_epoch",
}  # fmt: skip
_NO_RESULT = {  # how their programs go about it: it does not say what is pruned
    "block_size", "sequential_update", "offload_hessians", "update", "update_frequency", "update_scheduler",
    "scheduler_args", "inter_func", "leave_enabled", "global_sparsity", "group", "index", "log_types",
}  # fmt: skip


@dataclass
class Converted:
    """Fields of a sparsec recipe, without its model, and what is to be said about them."""

    targets: dict[str, str] = field(default_factory=dict)
    pruning: str = ""
    """The pass that prunes."""
    training: str = ""
    """The pass that trains under the zeros of that one."""
    notes: list[str] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        """As `Recipe.from_data` takes it."""
        last = " | freeze" if self.pruning == "mask" and not self.training else ""
        passes = " | ".join(filter(None, [self.pruning, self.training]))
        return {"targets": self.targets, "passes": passes + last}


def is_foreign(text: str) -> bool:
    """Whether the text of a recipe file has stages or groups of modifiers, as theirs have and ours never do."""
    return _FOREIGN.search(text) is not None


def read_foreign(text: str, path: Path) -> dict[str, Any]:
    """`convert`, as plain data; what became of the recipe is logged, in sparsec's own text."""
    import yaml

    made = convert(text)
    ours = yaml.safe_dump(made.data, sort_keys=False)
    told = [f"{path} is a recipe of llm-compressor or SparseML; as one of sparsec's own it is", ours, *made.notes]
    log.warning("%s", "\n".join(told))
    return made.data


def convert(text: str) -> Converted:
    """Turn the text of a YAML, JSON or Markdown recipe of theirs into ours.

    Raises RecipeError naming the modifier, the option or the line; yaml.YAMLError for what is no YAML.
    """
    import yaml

    front = _FRONT_MATTER.match(text)
    data = yaml.load(front[1] if front else text, _loader())  # a SafeLoader
    if not isinstance(data, dict):
        raise RecipeError(f"expected stages with modifiers, found {type(data).__name__}")
    modifiers = list(_modifiers(data))
    epochs = max((_number(name, o, "end_epoch", 0) for name, o, _ in modifiers if name == _EPOCHS), default=0.0)
    made = Converted()
    for name, options, trains in modifiers:
        _check(name, options)
        if name in _ONESHOT:
            damping = options.get("dampening_frac", options.get("percdamp"))
            _add(made, name, options, _ONESHOT[name].replace("%s", f", damping={damping}" if damping else ""))
        elif name in _MAGNITUDE:
            _add(made, name, options, _schedule(name, options, epochs))
        elif name == _CONSTANT:
            _keep(made, trains, math.ceil(epochs))
    if not made.pruning:
        raise RecipeError(f"none of its modifiers prunes; expected one of {', '.join(SUPPORTED[:-1])}")
    return made


def _loader() -> Any:
    """The loader of sparsec's own recipes, but `!Name {..}` is `{Name: {..}}`, and Python's tags leave their value."""
    import yaml

    def plain(loader: Any, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return loader.construct_mapping(node, deep=True)
        return loader.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else node.value

    loader: Any = type("Loader", (strict_loader(),), {})
    loader.add_multi_constructor("!", lambda loader, name, node: {name: plain(loader, node) or {}})
    loader.add_multi_constructor(_PYTHON, lambda loader, _, node: plain(loader, node))
    return loader


def _modifiers(data: Mapping[str, Any], trains: bool = False) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Each modifier's name and options in order, and whether its stage trains."""
    for key, value in data.items():
        if str(key).endswith("_stage") and isinstance(value, dict):
            run = f"{key} {value.get('run_type', '')}"
            yield from _modifiers(value, "train" in run or "finetun" in run)
        elif str(key).endswith("modifiers"):
            groups = value if isinstance(value, list) else [value]
            if not all(isinstance(group, dict) for group in groups):
                raise RecipeError(f"{key}: expected modifiers by name, each with its options")
            for name, options in [pair for group in groups for pair in group.items()]:
                if not isinstance(options or {}, dict):
                    raise RecipeError(f"{name}: expected options by name, found {options!r}")
                yield name, options or {}, trains
        elif isinstance(value, dict) and key not in ("args", "metadata", "recipe_args"):
            raise RecipeError(
                f"{key!r} is neither a stage nor a group of modifiers (their names end in _stage and _modifiers), so "
                "what it holds would not be used; rename it"
            )


def _check(name: str, options: dict[str, Any]) -> None:
    """Refuse what has no counterpart (rule 3)."""
    if name not in SUPPORTED:
        raise RecipeError(
            f"modifier {name} has no counterpart in sparsec; supported are {', '.join(SUPPORTED)}. Take it out; "
            "what it did may be an option of compile: --values int8, --lr, --teacher"
        )
    for key, value in options.items():
        if isinstance(value, str) and value.startswith("eval("):
            raise RecipeError(f"{name}: {key} is {value!r}; write the value itself, nothing is computed here")
        known = key in _OPTIONS | _NO_RESULT or key.endswith("_")
        if name != _EPOCHS and not known and value not in (None, False):
            raise RecipeError(
                f"{name}: option {key} (found {value!r}) has no counterpart in sparsec; supported are "
                f"{', '.join(sorted(_OPTIONS))}. Take it out"
            )


def _add(made: Converted, name: str, options: dict[str, Any], pruning: str) -> None:
    """Add what a pruning modifier says."""
    if made.pruning not in ("", pruning):
        raise RecipeError(
            f"{name} asks for {pruning}, an earlier modifier for {made.pruning}; a recipe prunes in one way, which may "
            "have several patterns: make it two recipes"
        )
    pattern = _pattern(name, options, made.notes)
    targets = options.get("targets", options.get("params")) or ["Linear"]
    found, notes = selectors_of(name, targets, options.get("ignore") or [])
    made.targets |= {selector: pattern if wanted else "ignore" for selector, wanted in found.items()}
    made.notes += notes
    made.pruning = pruning


def _keep(made: Converted, trains: bool, epochs: int) -> None:
    """Zeros that stay: those of the modifier before, or those that are there."""
    made.pruning = made.pruning or "adopt"
    if made.pruning.startswith("gradual") or not (trains or epochs):
        made.notes.append(f"{_CONSTANT}: nothing is to be done; what is zero stays zero, whatever follows")
    else:
        made.training = f"fixed-mask{{epochs={epochs}}}" if epochs else "fixed-mask"


def _pattern(name: str, options: dict[str, Any], notes: list[str]) -> str:
    """The pattern's text (rule 1)."""
    structure = str(options.get("mask_structure") or options.get("mask_type") or "unstructured")
    if structure in ("0:0", "unstructured"):
        key = "final_sparsity" if "final_sparsity" in options else "sparsity"
        share = _number(name, options, key, -1)
        if not 0 < share < 1:
            raise RecipeError(f"{name}: {key} is {options.get(key)!r}; expected one share of zeros between 0 and 1")
        text = f"unstructured:{share:g}"
        notes.append(f"{name}: {key} {share:g} is {Pattern.parse(text).words}")
        return text
    match = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", structure)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise RecipeError(f"{name}: mask_structure is {structure!r}; expected N:M with 0 < N < M, 0:0 or unstructured")
    pruned, of = int(match[1]), int(match[2])
    text = f"{of - pruned}:{of}"
    words = Pattern.parse(text).words
    notes.append(f"{name}: mask_structure {structure} prunes {pruned} of {of}; here that is {text}, {words}")
    if abs(_number(name, options, "sparsity", pruned / of) - pruned / of) > _ROUNDING:
        notes.append(
            f"{name}: sparsity {options['sparsity']} changes nothing beside mask_structure {structure}, as there"
        )
    return text


def _schedule(name: str, options: dict[str, Any], epochs: float) -> str:
    """`gradual`, where zeros grow from an epoch to another one, or `mask`."""
    start = _number(name, options, "start_epoch" if "start_epoch" in options else "start", 0)
    end = _number(name, options, "end_epoch" if "end_epoch" in options else "end", 0)
    if end <= max(start, 0):
        return "mask"
    total = math.ceil(max(epochs, end))
    return f"gradual{{epochs={total}, start={max(start, 0) / total:g}, end={end / total:g}}}"


def _number(name: str, options: Mapping[str, Any], key: str, default: float) -> float:
    try:
        return float(options.get(key, default) if options.get(key) is not None else default)
    except (TypeError, ValueError):
        raise RecipeError(f"{name}: {key} is {options[key]!r}; expected one number") from None
