"""What training and judging by a task need of `compile`: data with labels, a head, a teacher, figures for the manifest.

1. All that can be refused is refused before the first pass, most of it before the model is loaded.
2. A classification head that is stored says which classes there are, by name and in order; else the data say it.
3. The dense model's figure is left out where its head is new: nobody has trained it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError
from sparsec.heads import Head, class_names
from sparsec.loaded import Loaded
from sparsec.methods import training_passes
from sparsec.pretrained import read_config
from sparsec.recipe import Head as Kind
from sparsec.recipe import Recipe, parse_passes
from sparsec.taskdata import EVAL, PICTURES, read_all, sources_of
from sparsec.teachers import load_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program
    from sparsec.training.labelled import Labelled, Rows
    from sparsec.training.labels import Task

_HEADS: dict[Task, Kind] = {"classification": "sequence-classification", "regression": "regression", "lm": "causal-lm"}
_BATCH = 32  # rows that are judged at once where nothing is trained
Run = Callable[..., dict[str, "Tensor"]]


@dataclass(frozen=True)
class Work:
    """The rows of a recipe's --train and --eval; `begin` makes them data of a model."""

    recipe: Recipe
    location: str | None = None
    """Of a Hugging Face model, whose head has a place for each class by name."""
    rows: Mapping[str, Rows] = field(default_factory=dict)
    """By TRAIN and EVAL, as far as they were named, and by the DATA that passes name themselves (`data=hans.tsv`)."""

    @property
    def head(self) -> Head | None:
        """The head that the model is to have; None: whatever it has."""
        rows = next((rows for rows in self.rows.values() if rows.task in _HEADS), None)
        if rows is None:
            return None
        kind: Kind = PICTURES if rows.kind == "pictures" else _HEADS[rows.task]
        return Head(kind, rows.classes, asked=bool(self.recipe.task))

    @property
    def teachers(self) -> list[str]:
        """What the passes call their teachers, but for the dense model itself."""
        from sparsec.training.passes import DENSE

        training = training_passes(self.recipe.passes)
        named = (one.teacher for one in training if (one.distill or one.loss == "confreg") and one.teacher != DENSE)
        return list(dict.fromkeys(named))

    @property
    def named(self) -> list[str]:
        """All text in the passes, some of which may name files: teachers, data, adapters."""
        passes = parse_passes(self.recipe.passes) if self.recipe.passes else ()
        texts = (getattr(one, part.name) for one in passes for part in dataclasses.fields(one))
        return [text for text in texts if isinstance(text, str)]

    def begin(self, loaded: Loaded, trust: bool) -> Begun:
        """Encode the rows for a model and load its teachers (rule 1)."""
        from sparsec.training.labelled import encode_labelled

        if loaded.head and all(name == EVAL or rows.task == "none" for name, rows in self.rows.items()):
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
    sources = sources_of(recipe, resources)
    if not sources:
        if recipe.task or recipe.label_column:
            given = f"--task {recipe.task}" if recipe.task else f"--label-column {recipe.label_column}"
            raise UsageError(f"{given} is for data of a task: add --train DATA and --method, or --eval DATA")
        return Work(recipe)
    known = class_names(read_config(location)) if location else ()
    return Work(recipe, location, read_all(recipe, sources, known))


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
        """The manifest's part on what was trained on, further data in `also`; nothing where nothing was."""
        told = [_told(data) for name, data in self.data.items() if name != EVAL]
        if not told:
            return {}
        first = {**told[0], **({"head": self.loaded.head} if self.loaded.head else {})}
        return {"training": {**first, **({"also": told[1:]} if told[1:] else {})}}

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


def _told(data: Labelled) -> dict[str, Any]:
    """Of data that were trained on, for the manifest; `remark` where their bias model is perfect or useless."""
    from sparsec.training.debiasing import remark
    from sparsec.training.losses import BIAS

    told: dict[str, Any] = {key: getattr(data, key) for key in ("words", "sha256", "samples", "task")}
    told |= {"classes": list(data.classes)} if data.classes else {}
    said = remark(data.batches) if BIAS in data.batches[0] else None
    return {**told, **({"remark": said} if said else {})}
