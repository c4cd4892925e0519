"""The rows of the data that a recipe names: of which source, split, task and classes, and with which bias model.

1. `train` is --train's data. Passes may name other DATA instead: `data=hans.tsv`, `data=glue/sst2`. A word that is no
   file or folder names batches given in Python.
2. All data are of one task, with the classes of the model's stored head, else those of the data that are read first:
   --train's, then those of passes, then --eval's.
3. A bias model is read for data of passes whose loss is against a bias, and for no others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec.errors import UsageError
from sparsec.methods import training_passes
from sparsec.recipe import Recipe

if TYPE_CHECKING:
    from sparsec.training.labelled import Rows
    from sparsec.training.labels import Task
    from sparsec.training.passes import TrainingPass

TRAIN: Literal["train"] = "train"
EVAL: Literal["eval"] = "eval"
PICTURES: Literal["image-classification"] = "image-classification"
_TASKS: dict[str, Task] = {
    "sequence-classification": "classification",
    PICTURES: "classification",
    "regression": "regression",
    "causal-lm": "lm",
    "none": "none",
}
_WORD = re.compile(r"[A-Za-z_][\w-]*")


def sources_of(recipe: Recipe, resources: Mapping[str, Any]) -> dict[str, str]:
    """The DATA of every resource that is to be made of some, in the order of rule 2.

    Raises UsageError for data that are missing, named twice or of no use.
    """
    training = training_passes(recipe.passes)
    for name in (TRAIN, EVAL):
        if getattr(recipe, name) and name in resources:
            raise UsageError(f"{name} data were given in Python and by name ({getattr(recipe, name)}); leave one out")
    wanted = [one for one in training if one.data not in resources]
    if recipe.train and not any(one.data == TRAIN for one in wanted):
        why = "no pass reads it" if training else "no pass trains"
        raise UsageError(
            f"--train {recipe.train}: {why} ({recipe.passes or 'the default prunes in one shot'}); add "
            "--method admm or fixed-mask, or a training pass to --passes"
        )
    for one in wanted:
        is_word = _WORD.fullmatch(one.data) and not Path(one.data).exists()
        if not recipe.train if one.data == TRAIN else is_word:
            raise UsageError(
                f"pass {one.name} needs data to train on: give --train DATA, which with --teacher may be text without "
                f"labels, or in Python batches, resources={{{one.data!r}: [...]}}"
            )
    if recipe.bias and not any(_against(one) for one in wanted):
        raise UsageError(
            f"--bias {recipe.bias}: no pass works against a bias of named data; add loss=poe, reweight or confreg to "
            "one that trains, such as --method 'mask-training{loss=poe}'; batches given in Python have their own 'bias'"
        )
    named = {TRAIN: recipe.train, **{one.data: one.data for one in wanted if one.data != TRAIN}, EVAL: recipe.eval}
    return {name: source for name, source in named.items() if source}


def read_all(recipe: Recipe, sources: Mapping[str, str], known: tuple[str, ...]) -> dict[str, Rows]:
    """Rows by name. `known`: the classes of the model's stored head. Raises UsageError for what does not fit."""
    found: dict[str, Rows] = {}
    training = training_passes(recipe.passes)
    for name, source in sources.items():
        readers = [one for one in training if name in (one.data, EVAL)]
        before = next((rows for rows in found.values() if rows.task != "none"), None)
        found[name] = _read(recipe, source, name, readers, before, known)
    for rows in found.values():
        if recipe.task and rows.task == "classification" and (recipe.task == PICTURES) != (rows.kind == "pictures"):
            raise UsageError(f"--task {recipe.task} does not fit {rows.words}; leave --task out, or name other data")
    if EVAL in found and found[EVAL].task == "none":
        raise UsageError(
            f"--eval {recipe.eval}: found no labels, so there is nothing to judge by; name the column of labels with "
            "--label-column, or the task of text without labels with --task causal-lm"
        )
    for one in training:
        if one.data in found and found[one.data].task == "lm" and one.loss == "auto":
            raise UsageError(f"pass {one.name}: to learn the next token write {one.name}{{loss=lm}}; found loss=auto")
    return found


def _read(
    recipe: Recipe,
    source: str,
    name: str,
    readers: Sequence[TrainingPass],
    before: Rows | None,
    known: tuple[str, ...],
) -> Rows:
    """Rows of one source, for the passes that read it (rules 2 and 3)."""
    from sparsec.training.labelled import read_labelled

    against = name != EVAL and any(map(_against, readers))

    def read(task: Task | None, classes: Sequence[str]) -> Rows:
        return read_labelled(
            source,
            text_columns=recipe.text_columns,
            label_column=recipe.label_column,
            task=task,
            split=EVAL if name == EVAL else TRAIN,
            classes=classes,
            length=recipe.max_seq_length,
            bias_source=(recipe.bias or "columns") if against else "",
        )

    if before is not None:
        return read(before.task, before.classes)
    task = _TASKS.get(recipe.task) or ("lm" if any(one.loss == "lm" for one in readers) else None)
    if task is None and any(one.distill for one in readers) and not against and read(None, ()).task == "lm":
        return read("none", ())  # no labels, and no wish for the next token: there is a teacher
    if task not in (None, "classification") or not known:
        return read(task, ())
    if len(known) == 1 and task is None:
        return read("regression", ())
    try:
        return read(task, known)
    except UsageError:
        found = read(task, ())
        if found.task == "classification" and (not recipe.task or len(found.classes) == len(known)):
            raise
        return found


def _against(one: TrainingPass) -> bool:
    """Whether a pass has a loss against a bias."""
    from sparsec.training.debiasing import TERMS

    return one.loss in TERMS
