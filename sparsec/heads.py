"""The head that a task needs on a Hugging Face model: which class of transformers, how many outputs, what is new in it.

1. A head of the right size is kept. Any other is made anew where the task was named, and refused where it was not.
2. What is new comes from the seed, is said in words, and is trained like every other parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsec.errors import UsageError
from sparsec.recipe import Head as Kind

_AUTO: dict[Kind, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
    "regression": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
}
_ENDINGS: dict[Kind, tuple[str, ...]] = {
    "sequence-classification": ("ForSequenceClassification",),
    "image-classification": ("ForImageClassification",),
    "regression": ("ForSequenceClassification",),
    "causal-lm": ("ForCausalLM", "LMHeadModel"),
}
"""What the names of transformers' classes with such a head end in."""
_NO_TOKEN = -1  # stands for padding where a model has no token for it: batches are never padded


@dataclass(frozen=True)
class Head:
    """What a model's head is to be."""

    kind: Kind
    """sequence-classification, image-classification, regression or causal-lm."""
    classes: tuple[str, ...] = ()
    asked: bool = False
    """The task was named, so a head that does not fit makes place for a new one."""

    @property
    def words(self) -> str:
        """`2 classes`."""
        return {"regression": "one number", "causal-lm": "the vocabulary"}.get(
            self.kind, f"{len(self.classes)} classes"
        )

    @property
    def outputs(self) -> int | None:
        """How many numbers it gives for a sample; None: the vocabulary's."""
        return {"regression": 1, "causal-lm": None}.get(self.kind, len(self.classes))


def class_names(config: Any) -> tuple[str, ...]:
    """The classes of a stored classification head, by number where it has no names; none where there is no such head.

    One class: the head gives one number.
    """
    names: dict[int, str] = getattr(config, "id2label", None) or {}
    if not _has(config, "sequence-classification") and not _has(config, "image-classification"):
        return ()
    return tuple(str(i) if names[i] == f"LABEL_{i}" else str(names[i]) for i in sorted(names))


def prepare(config: Any, head: Head, model: str) -> str | None:
    """The name of the class of transformers that loads the head; None: the stored one. Writes sizes into `config`.

    Raises UsageError for a model whose head does not fit (rule 1).
    """
    stored = (getattr(config, "architectures", None) or ["no named class"])[0]
    if not _has(config, head.kind):
        if not head.asked:
            raise UsageError(
                f"{model} is {stored}, which has no head for {head.words}; add --task {head.kind} for a new head, "
                "which is trained with the rest, or give a model that has one"
            )
        _resize(config, head)
        return _AUTO[head.kind]
    if head.outputs is None or head.outputs == config.num_labels:
        return None
    if not head.asked:
        raise UsageError(
            f"{model} ({stored}) has a head for {config.num_labels} labels, and the data ask for {head.words}; give "
            f"data of its {config.num_labels} labels, or add --task {head.kind} for a new head"
        )
    _resize(config, head)
    return None


def _resize(config: Any, head: Head) -> None:
    if head.outputs is None:
        return
    names = head.classes or ("value",)
    config.id2label = dict(enumerate(names))  # which sets num_labels too
    config.label2id = {name: i for i, name in enumerate(names)}
    config.problem_type = "regression" if head.kind == "regression" else "single_label_classification"


def new_parts(head: Head, info: dict[str, Any]) -> str:
    """What of a loaded model is new, in words, from what transformers tells about missing and mismatched tensors."""
    keys = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
    modules = dict.fromkeys(key.rpartition(".")[0] or key for key in sorted(keys))
    return f"new head for {head.words}: {_listed(list(modules))}" if modules else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def settle(model: Any) -> None:
    """Name a padding token where a decoder has none, whose head looks for the last token before it; and the class."""
    config = model.config
    if getattr(config, "pad_token_id", None) is None:
        end = getattr(config, "eos_token_id", None)
        config.pad_token_id = end if isinstance(end, int) else _NO_TOKEN
    config.architectures = [type(model).__name__]


def settings(config: Any) -> dict[str, Any]:
    """The part of a configuration that belongs to the head, as config.json has it."""
    names = {str(i): str(name) for i, name in config.id2label.items()}
    numbers = {name: int(i) for i, name in names.items()}
    found = {"id2label": names, "label2id": numbers, "problem_type": getattr(config, "problem_type", None)}
    return {**found, "pad_token_id": config.pad_token_id}


def _has(config: Any, kind: Kind) -> bool:
    return any(name.endswith(_ENDINGS[kind]) for name in (getattr(config, "architectures", None) or [])[:1])
