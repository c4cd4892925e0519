"""Which modules another tool's recipe means, as selectors of sites: `*`, or `re:` a regular expression.

There, a text is a class of modules, a module's name, or `re:` an expression that a module's name begins with; what is
inside of a module that is meant is meant too. Here, an expression is searched in the names of parameters.
"""

from __future__ import annotations

import re
from typing import Any

from sparsec.errors import RecipeError

_EVERY = {"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "__ALL__", "__ALL_PRUNABLE__"}
_BLOCKS = ("Layer", "Block")  # as classes of blocks end: what is linear in them is all but heads
_HEADS = ("lm_head", "model.lm_head", "classifier", "score", "embed_out")
_NO_HEADS = ("model.layers.0.mlp.up_proj", "bert.encoder.layer.0.output.dense")


def selectors_of(name: str, targets: Any, ignore: Any) -> tuple[dict[str, bool], list[str]]:
    """Selector -> whether what it matches is pruned, later ones win; and what is to be said about them.

    `name`: of the modifier, for errors. Raises RecipeError for what can be no module and for a wrong expression.
    """
    notes: list[str] = []
    wanted, unwanted = _texts(name, "targets", targets), _texts(name, "ignore", ignore)
    skipped = []
    for text in unwanted:
        if _is_class(text) and text not in _EVERY:
            notes.append(f"{name}: ignore {text} is left out: a class that is no linear layer has nothing to prune")
        elif text in _EVERY:
            raise RecipeError(f"{name}: ignore is {text}, which is what is pruned; name modules, such as re:.*lm_head")
        else:
            skipped.append((text, _expression(name, text)))
    if odd := [text for text in wanted if _is_class(text) and text not in _EVERY and not text.endswith(_BLOCKS)]:
        raise RecipeError(
            f"{name}: targets has the class {odd[0]}; sparsec prunes linear layers: write Linear, or names"
        )
    if all(_is_class(text) for text in wanted):
        found = {"*": True}
        for text, expression in skipped:
            if _is_head(expression):
                notes.append(f"{name}: ignore {text} is left out: heads stay dense here unless they are asked for")
            else:
                found[f"re:^{expression}"] = False
        return found, notes
    if some := [text for text in wanted if _is_class(text)]:
        raise RecipeError(f"{name}: targets has the class {some[0]} and names beside it; leave the class or the names")
    but = "".join(f"(?!{expression})" for _, expression in skipped)
    return {f"re:^{but}{_expression(name, text)}": True for text in wanted}, notes


def _texts(name: str, key: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RecipeError(f"{name}: {key} is {value!r}; expected names, or expressions that begin with re:")
    return texts


def _is_class(text: str) -> bool:
    """Names of modules begin small."""
    return text in _EVERY or re.fullmatch(r"[A-Z]\w*", text) is not None


def _expression(name: str, text: str) -> str:
    """What the names of parameters of a module that is meant begin with."""
    if not text.startswith("re:"):
        return rf"{re.escape(text)}(?:\.|$)"
    expression = text.removeprefix("re:").removeprefix("^")
    try:
        re.compile(expression)
    except re.error as error:
        raise RecipeError(f"{name}: {text!r} is not a regular expression: {error}") from None
    if expression.endswith("$") and not expression.endswith(r"\$"):
        return rf"(?:{expression[:-1]})(?:\.|$)"
    return f"(?:{expression})"


def _is_head(expression: str) -> bool:
    """Whether an expression means a head, and not the layers before it."""
    return any(re.match(expression, f"{head}.weight") for head in _HEADS) and not any(
        re.match(expression, f"{other}.weight") for other in _NO_HEADS
    )
