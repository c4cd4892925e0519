"""A teacher that a training pass names by MODEL text: loaded, and checked against the model that learns from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsec.errors import UsageError
from sparsec.loaded import Loaded
from sparsec.models import load_model
from sparsec.recipe import Recipe

if TYPE_CHECKING:
    from sparsec.program import Program


def load_teacher(name: str, recipe: Recipe, student: Loaded, trust: bool, hidden: bool) -> Program:
    """The Program of a teacher that a pass names, a MODEL. Raises UsageError where it cannot teach this model.

    `hidden`: the outputs that are no logits are learnt too.
    """
    import torch

    from sparsec.training.losses import LOGITS

    try:
        loaded = load_model(name, recipe.seed, trust, recipe.dtype)
    except UsageError as error:
        raise UsageError(f"teacher: {error}") from error
    teacher, program = loaded.program, student.program
    if missing := next((key for key in teacher.inputs if key not in program.inputs), None):
        raise UsageError(
            f"teacher {name} takes {missing}, which the model, with {', '.join(program.inputs)}, is not given; take a "
            "teacher of the model's own kind"
        )
    words, own = (one.tools.tokenizer and one.tools.tokenizer.get_vocab() for one in (loaded, student))
    if words != own and None not in (words, own):
        raise UsageError(
            f"teacher {name} has another vocabulary, of {len(words)} tokens where the model has {len(own)}, so the "
            "same ids would be other words to it; take a teacher with the model's tokenizer"
        )
    try:
        with torch.no_grad():
            given = teacher(**{key: program.inputs[key] for key in teacher.inputs})
            outputs = program(**program.inputs)
    except (IndexError, RuntimeError) as error:  # ids beyond its embedding, sizes that it does not take
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"teacher {name} fails on the model's example inputs ({reason}); it must have the same vocabulary"
        ) from error
    for key, value in outputs.items():
        if not value.is_floating_point() or not (key == LOGITS or hidden):
            continue
        if key not in given or given[key].shape != value.shape:
            there = list(given[key].shape) if key in given else "not there"
            raise UsageError(
                f"teacher {name}: its output {key} is {there}, the model's {list(value.shape)}; the teacher must have "
                "the same head and vocabulary: fine-tune it on the task first, or with other hidden sizes set hidden=0"
            )
    return teacher
