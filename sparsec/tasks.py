"""What training and judging by a task need of `compile`: rows with labels, a head, a teacher, figures for the manifest.

1. All that can be refused is refused before the first pass, most of it before the model is loaded.
2. A classification head that is stored says which classes there are, by name and in order; else the data say it.
3. The dense model's figure is left out where its head is new: nobody has trained it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from sparsec.errors import UsageError
from sparsec.heads import Head, class_names
from sparsec.loaded import Loaded
from sparsec.methods import training_passes
from sparsec.pretrained import read_config
from sparsec.recipe import Head as Kind
from sparsec.recipe import Recipe
from sparsec.teachers import load_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.training.labelled import Labelled, Rows
    from sparsec.training.labels import Task
    from sparsec.training.passes import TrainingPass

_TASKS: dict[str, Task] = {
    "sequence-classification": "classification",
    "image-classification": "classification",
    "regression": "regression",
    "causal-lm": "lm",
    "none": "none",
}
_HEADS: dict[Task, Kind] = {"classification": "sequence-classification", "regression": "regression", "lm": "causal-lm"}
_PICTURES: Kind = "image-classification"
_BATCH = 32  # rows that are judged at once where nothing is trained
TRAIN: Literal["train"] = "train"
EVAL: Literal["eval"] = "eval"
Run = Callable[..., dict[str, "Tensor"]]


@dataclass(frozen=True)
class Work:
    """The rows of a recipe's --train and --eval; `begin` makes them data of a model."""

    recipe: Recipe
    location: str | None = None
    """Of a Hugging Face model, whose head has a place for each class by name."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """By TRAIN and EVAL, as far as they were named."""

    @property
    def head(self) -> Head | None:
        """The head that the model is to have; None: whatever it has."""
        rows = next((rows for rows in self.rows.values() if rows.task in _HEADS), None)
        if rows is None:
            return None
        kind = _PICTURES if rows.kind == "pictures" else _HEADS[rows.task]
        return Head(kind, rows.classes, asked=bool(self.recipe.task))

    @property
    def teachers(self) -> list[str]:
        """What the passes call their teachers, but for the dense model itself."""
        from sparsec.training.passes import DENSE

        named = (one.teacher for one in training_passes(self.recipe.passes) if one.distill and one.teacher != DENSE)
        return list(dict.fromkeys(named))

    def begin(self, loaded: Loaded, trust: bool) -> Begun:
        """Encode the rows for a model and load its teachers (rule 1)."""
        from sparsec.training.labelled import encode_labelled

        if loaded.head and (TRAIN not in self.rows or self.rows[TRAIN].task == "none"):
            raise UsageError(
                f"{self.recipe.model} gets a {loaded.head}, and no labels to train it with; add --train DATA with "
                "labels and --method, or give a model that is trained on the task"
            )
        training = training_passes(self.recipe.passes)
        size = training[0].batch_size if training else _BATCH
        data: dict[str, Labelled] = {}
        for name, rows in self.rows.items():
            check_outputs(loaded.program, rows, bool(self.location))
            length = self.recipe.max_seq_length
            data[name] = encode_labelled(rows, loaded.program, loaded.tools, length=length, size=size)
        hidden = any(one.distill and one.hidden for one in training)
        named = [name for name in self.teachers if name not in loaded.tools.resources]
        teachers = {name: load_teacher(name, self.recipe, loaded, trust, hidden) for name in named}
        return Begun(loaded, data, teachers)


def prepare(recipe: Recipe, resources: Mapping[str, Any], location: str | None) -> Work:
    """Read the rows that a recipe names. Raises UsageError for what cannot be trained or judged.

    `location`: folder or hub id of a Hugging Face model; None for any other.
    """
    training = training_passes(recipe.passes)
    for name in (TRAIN, EVAL):
        if getattr(recipe, name) and name in resources:
            raise UsageError(f"{name} data were given in Python and by name ({getattr(recipe, name)}); leave one out")
    if recipe.train and not training:
        raise UsageError(
            f"--train {recipe.train}: no pass trains ({recipe.passes or 'the default prunes in one shot'}); add "
            "--method admm or fixed-mask, or a training pass to --passes"
        )
    lacking = next((one for one in training if not recipe.train and one.data not in resources), None)
    if lacking:
        raise UsageError(
            f"pass {lacking.name} needs data to train on: give --train DATA, which with --teacher may be text without "
            f"labels, or in Python batches, resources={{{lacking.data!r}: [...]}}"
        )
    if not recipe.train and not recipe.eval:
        if recipe.task or recipe.label_column:
            given = f"--task {recipe.task}" if recipe.task else f"--label-column {recipe.label_column}"
            raise UsageError(f"{given} is for data of a task: add --train DATA and --method, or --eval DATA")
        return Work(recipe)
    known = class_names(read_config(location)) if location else ()
    return Work(recipe, location, _read_all(recipe, training, known))


def _read_all(recipe: Recipe, training: Sequence[TrainingPass], known: tuple[str, ...]) -> dict[str, Rows]:
    """`known`: the classes of the model's stored head."""
    found: dict[str, Rows] = {}
    splits: tuple[Literal["train", "eval"], ...] = (TRAIN, EVAL)
    for name in splits:
        if source := getattr(recipe, name):
            found[name] = _read(recipe, source, name, training, found.get(TRAIN), known)
    for rows in found.values():
        if recipe.task and rows.task == "classification" and (recipe.task == _PICTURES) != (rows.kind == "pictures"):
            raise UsageError(f"--task {recipe.task} does not fit {rows.words}; leave --task out, or name other data")
    tasks = {name: rows.task for name, rows in found.items()}
    if tasks.get(EVAL) == "none":
        raise UsageError(
            f"--eval {recipe.eval}: found no labels, so there is nothing to judge by; name the column of labels with "
            "--label-column, or the task of text without labels with --task causal-lm"
        )
    if tasks.get(TRAIN) == "lm" and (plain := next((one for one in training if one.loss == "auto"), None)):
        raise UsageError(f"pass {plain.name}: to learn the next token write {plain.name}{{loss=lm}}; found loss=auto")
    return found


def _read(
    recipe: Recipe,
    source: str,
    split: Literal["train", "eval"],
    training: Sequence[TrainingPass],
    before: Rows | None,
    known: tuple[str, ...],
) -> Rows:
    """Rows of one source: of the task and classes of those read before, else of the stored head's (rule 2)."""
    from sparsec.training.labelled import read_labelled

    def read(task: Task | None, classes: Sequence[str]) -> Rows:
        return read_labelled(
            source,
            text_columns=recipe.text_columns,
            label_column=recipe.label_column,
            task=task,
            split=split,
            classes=classes,
            length=recipe.max_seq_length,
        )

    if before is not None and before.task != "none":
        return read(before.task, before.classes)
    task = _TASKS.get(recipe.task) or ("lm" if any(one.loss == "lm" for one in training) else None)
    if task is None and any(one.distill for one in training) and read(None, ()).task == "lm":
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


def check_outputs(program: Program, rows: Rows, named: bool) -> None:
    """Raise UsageError unless the main output fits the labels. `named`: the head has a place for each class by name."""
    import torch

    from sparsec.training.losses import main_name

    with torch.no_grad():
        outputs = program(**program.inputs)
    name = main_name(outputs)
    found, batch, many = list(outputs[name].shape), len(next(iter(program.inputs.values()))), len(rows.classes)
    expected, fits = {
        "classification": (f"[{batch}, {many}]", found[:1] == [batch] and len(found) == 2 and found[1] >= many),
        "regression": (f"[{batch}, 1]", found in ([batch, 1], [batch])),
        "lm": (f"[{batch}, length, vocabulary]", len(found) == 3),
        "none": ("", True),
    }[rows.task]
    if not fits:
        raise UsageError(
            f"{rows.words}: for {rows.task}{f' into {many} classes' if many else ''} the model's main output should be "
            f"{expected} on its example inputs; {name} is {found}. Give a model with such a head; a Hugging Face model "
            "gets one by --task"
        )
    numbers = [str(i) for i in range(many)]
    if not named and all(one.isdecimal() for one in rows.classes) and list(rows.classes) != numbers:
        raise UsageError(
            f"{rows.words}: found the labels {', '.join(rows.classes)}; this model's outputs have no names, so "
            f"expected every number from 0 to {many - 1}"
        )


@dataclass
class Begun:
    """Data of a task, made for a model, and what is measured on it."""

    loaded: Loaded
    data: Mapping[str, Labelled]
    teachers: Mapping[str, Program]
    _dense: dict[str, float] | None = None

    @property
    def resources(self) -> dict[str, Any]:
        """What passes find by name: `train` and `eval` as functions that give them, teachers as Programs."""
        return {**{name: partial(self.data.__getitem__, name) for name in self.data}, **self.teachers}

    def describe(self) -> dict[str, Any]:
        """The manifest's part on what was trained on; nothing where nothing was."""
        data = self.data.get(TRAIN)
        if data is None:
            return {}
        told = {key: getattr(data, key) for key in ("words", "sha256", "samples", "task")}
        told |= {"classes": list(data.classes)} if data.classes else {}
        return {"training": {**told, **({"head": self.loaded.head} if self.loaded.head else {})}}

    def quality(self, sparse: Run) -> dict[str, Any]:
        """What a task adds to the manifest's quality: metrics of the sparse and of the dense model (rule 3).

        With a new head the distance to the dense original is taken out: its outputs mean nothing.
        """
        from sparsec.training.metrics import evaluate, main_metric

        data, head = self.data.get(EVAL), self.loaded.head
        unknown: dict[str, Any] = {}
        if head:
            unknown = dict.fromkeys(("cosine", "relative_error", "embedding_cosine"))
            unknown["words"] = f"cannot be judged by the dense original, whose head is untrained ({head})"
        if data is None:
            return unknown
        if self._dense is None and not head:
            self._dense = evaluate(self.loaded.program, data.batches, data.task)
        found: dict[str, Any] = {"metric": main_metric(data.task), "sparse": evaluate(sparse, data.batches, data.task)}
        found |= {"dense": self._dense} if self._dense is not None else {"head": head}
        return {**unknown, "task": {**found, "samples": data.samples, "data": data.words}}
