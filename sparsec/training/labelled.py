"""Training data by name: the DATA of --train and --eval to batches of inputs and labels.

1. A data set is read from its split `train`, or for judging from the first of `validation`, `validation_matched`,
   `dev`, `val`, `test` that it has; a folder of pictures too, where all its folders are called so.
2. Without a task: a column of labels says which it is (see `labels`); without one, rows of nothing but text or token
   ids are for a language model. Only a task `none` (all there is to learn comes from a teacher) leaves labels unread.
3. A .txt is text as a whole; where columns, or labels, are asked for, it is a table with tabs.
4. Nothing is padded: samples of one length form batches. What cannot be a sample is left out, and `words` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import sources
from sparsec.data import Tools, allowed_length, check_ids, content_hash, picture_loader, samples_of, unit_of
from sparsec.errors import UsageError
from sparsec.signature import Signature
from sparsec.sources import IDS, Source
from sparsec.tables import Row, Table
from sparsec.training import bias
from sparsec.training.bias import Bias, BiasSource
from sparsec.training.labels import Labels, Task

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.encoding import Sample
    from sparsec.program import Program

Split = Literal["train", "eval"]
_SPLITS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "eval": ("validation", "validation_matched", "dev", "val", "test"),
}
_CLASSES = "label labels gold_label class target entailment_judgment entailment_label quality sentiment intent".split()
_SCORES = "score scores relatedness_score similarity_score similarity".split()
_BESIDE_IDS = {"attention_mask": 1, "token_type_ids": 0}  # what tokenizers give too, and what it must be
_DECODER = "decoder_input_ids"


@dataclass(frozen=True)
class Rows:
    """What DATA holds, before any model is seen."""

    kind: Literal["texts", "ids", "documents", "pictures"]
    """Documents are cut into samples of full length; any other item is a sample."""
    items: list[Row]
    """Where it stands, such as `line 3`, and: one or two texts, the text of a document, token ids, or a Path."""
    labels: list[int] | list[float] | None
    """Of each item, where the task is classification or regression."""
    classes: tuple[str, ...]
    """Their names in the order of their numbers; none where there are no classes."""
    task: Task
    words: str
    """`67349 rows of sst2/train.tsv (sentence, label)`."""
    bias: Bias | None = None
    """What a bias model says of each item, where it was asked for."""


@dataclass(frozen=True)
class Labelled:
    """Batches for training or judging: inputs of a program by name, and `labels` but for the task none."""

    batches: tuple[dict[str, Tensor], ...]
    """Every batch holds samples of one length; labels are int64, scores and log-probabilities `bias` float32."""
    words: str
    sha256: str
    """Of the content: names, types, shapes and bytes, batch by batch."""
    samples: int
    task: Task
    classes: tuple[str, ...]


def read_labelled(
    source: str,
    *,
    text_columns: Sequence[str] = (),
    label_column: str = "",
    task: Task | None = None,
    split: Split = "train",
    classes: Sequence[str] = (),
    length: int = 128,
    bias_source: BiasSource = "",
) -> Rows:
    """What `source` holds for a task, or for the task that it looks like (rules 1 to 3).

    `classes`: the only ones there may be, of the training data or of a model's config. `length`: tokens of a sample,
    about, for pieces of long text. `bias_source`: where a bias model's answers come from; see `bias`. Raises UsageError
    naming file, line and columns.
    """
    sources.check(source)
    if not source:
        raise UsageError(f"found no name of data; give --{split} DATA: a file, a folder, or a hub data set's name")
    if source.startswith(sources.GIVEN):
        raise UsageError(
            "the recipe's training batches were given in Python and are not kept in it; give the same ones again with "
            "resources={...}, or name other data with --train"
        )
    if label_column and task in ("lm", "none"):
        raise UsageError(f"--label-column {label_column}: the task {task} reads no labels; leave one of the two out")
    path, wanted = Path(source), [*text_columns, *([label_column] if label_column else [])]
    if found := sources.pictures(path):
        bias.refuse(bias_source, path.name, "folder of pictures")
        return _pictures(path, found, task, split, classes)
    if task not in ("classification", "regression") and sources.is_prose(path, wanted):
        bias.refuse(bias_source, path.name, "text without labels")
        items: list[Row] = [(f"piece {i}", (one,)) for i, one in enumerate(sources.pieces(path, length))]
        return Rows("documents", items, None, (), task or "lm", f"{len(items)} pieces of {path.name}")
    table = sources.table_of(source, wanted, _SPLITS[split])
    shown = f"{path.resolve().parent.name}/{path.name}" if path.is_file() else source
    return _rows(table, shown, text_columns, label_column, task, classes, bias_source)


def _rows(
    table: Table, shown: str, wanted: Sequence[str], label: str, task: Task | None, classes: Sequence[str],
    bias_source: BiasSource,
) -> Rows:  # fmt: skip
    label = _label_column(table, label, task)
    tokens = not wanted and IDS in table.columns
    chosen = (IDS,) if tokens else sources.text_columns(table, wanted, but=[label])
    if label in chosen:
        raise UsageError(f"{table.name}: the column {label!r} holds the labels, so it cannot be the text as well")
    if not label and task is None and len(chosen) == 1 and not set(table.columns) - {*chosen, *_BESIDE_IDS}:
        task = "lm"
    items = _token_rows(table) if tokens else sources.text_rows(table, chosen)
    if not items:
        raise UsageError(f"{table.name} is empty; expected rows")
    words = f"{len(items)} rows of {shown} ({', '.join([*chosen, *([label] if label else [])])})"
    if task in ("lm", "none"):
        bias.refuse(bias_source, table.name, "text without labels")
        if task == "lm" and len(chosen) > 1:
            raise UsageError(f"--text-columns {','.join(chosen)}: a language model learns from one column; name it")
        kind: Literal["ids", "documents", "texts"] = "ids" if tokens else "documents" if task == "lm" else "texts"
        return Rows(kind, items, None, (), task, words)
    if not label:
        raise UsageError(
            f"{table.name}: which column holds the labels? Expected label, score or another usual name; its columns "
            f"are {table.listed}; say which with --label-column{table.hint}, or what to learn without with --task "
            "causal-lm or none"
        )
    places, found = zip(*((place, raw) for place, (raw,) in table.values([label])), strict=True)
    names = tuple(table.classes.get(label, ()))
    target = Labels(f"{table.name}, column {label}", places, found, names).target(task, classes)
    biased = bias.of(bias_source, table, target, items)
    return Rows("ids" if tokens else "texts", items, target.values, target.classes, target.task, words, biased)


def _token_rows(table: Table) -> list[Row]:
    for column in set(table.columns) & _BESIDE_IDS.keys():
        for place, (values,) in table.values([column]):
            if not isinstance(values, list) or any(value != _BESIDE_IDS[column] for value in values):
                raise UsageError(
                    f"{table.name}, {place}: {column} is {str(values)[:40]}, expected only {_BESIDE_IDS[column]}; give "
                    "token ids of one text without padding, or pairs as text"
                )
    return sources.id_rows(table)


def _label_column(table: Table, wanted: str, task: Task | None) -> str:
    if task in ("lm", "none"):
        return ""
    if wanted:
        table.check([wanted], "--label-column")
        return wanted
    by_name = {column.lower(): column for column in reversed(table.columns)}
    usual = (*_SCORES, *_CLASSES) if task == "regression" else (*_CLASSES, *_SCORES)
    return next((by_name[name] for name in usual if name in by_name), "")


def _pictures(path: Path, found: Sequence[Path], task: Task | None, split: Split, classes: Sequence[str]) -> Rows:
    if task not in (None, "classification", "none"):
        raise UsageError(
            f"{path.name} holds pictures in folders that name their classes; the task {task} has no use for it"
        )
    folders = {file.relative_to(path).parts[0] for file in found}
    if folders <= {name for names in _SPLITS.values() for name in names}:  # rule 1
        name = next((name for name in _SPLITS[split] if name in folders), None)
        if name is None:
            raise UsageError(
                f"{path.name} holds {', '.join(sorted(folders))}, expected {' or '.join(_SPLITS[split])}; name the "
                "folder of folders that name classes"
            )
        path, found = path / name, [file for file in found if file.relative_to(path).parts[0] == name]
    items: list[Row] = [(str(file.relative_to(path)), file) for file in found]
    words = f"{len(items)} pictures of {path.name}"
    if task == "none":
        return Rows("pictures", items, None, (), task, words)
    for place, file in items:
        if file.parent == path:
            raise UsageError(f"{path.name}: {place} lies in no folder; expected folders that name classes: move it")
    names = [Path(place).parts[0] for place, _ in items]
    target = Labels(f"{path.name}, its folders", [place for place, _ in items], names).target("classification", classes)
    return Rows("pictures", items, target.values, target.classes, target.task, words)


def encode_labelled(rows: Rows, program: Program, tools: Tools, *, length: int, size: int) -> Labelled:
    """The batches of at most `size` samples, of at most `length` tokens, that `program` takes (rule 4).

    The labels of a language model are its input ids. Raises UsageError where the data do not fit the program.
    """
    takes = Signature.of(program)
    if rows.kind == "pictures":
        batches, possible = tuple(_picture_batches(rows, takes, tools, size)), len(rows.items)
        unit, notes = "pictures", ""
    else:
        samples, notes = _samples(rows, takes, tools, length)
        batches, possible = tuple(_token_batches(samples, takes, rows.task, size)), len(samples)
        unit = unit_of([sample for sample, _ in samples])
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    if count < possible:
        notes += f", {possible - count} left out that fill no batch of the one size that the model takes"
    if not count:
        raise UsageError(
            f"{rows.words}: found no sample that the model can take{notes}; {takes.words}: name more data, or another "
            "--max-seq-length"
        )
    if rows.bias:
        notes += f"; bias model: {rows.bias.words}"
    return Labelled(
        batches, f"{count} {unit} from {rows.words}{notes}", content_hash(batches), count, rows.task, rows.classes
    )


def _samples(rows: Rows, takes: Signature, tools: Tools, length: int) -> tuple[list[tuple[Sample, Any]], str]:
    """Samples with their labels, beside which stands what a bias model says, and in words what was cut or left out."""
    if takes.ids is not None:
        length = allowed_length(length, takes.most)
    labels: list[Any] = list(rows.labels or [None] * len(rows.items))
    if rows.bias:
        labels = list(zip(labels, rows.bias.rows, strict=True))
    items: list[Row] = rows.items
    if rows.kind == "texts":
        kept = [any(part.strip() for part in parts) for _, parts in items]
        items, labels = list(compress(items, kept)), list(compress(labels, kept))
    if rows.kind == "ids":
        check_ids(items, takes, tools, rows.words)
    if rows.kind == "documents":
        whole = [parts[0] for _, parts in items]
        found = list(samples_of(Source("documents", whole, rows.words), takes, tools, length))
        labels = [None] * len(found)
    else:
        found = list(samples_of(Source(rows.kind, items, rows.words), takes, tools, length))
    if rows.kind != "ids":
        check_ids([("tokenized", sample.ids) for sample in found], takes, tools, rows.words)
    least = max(takes.least, 2 if rows.task == "lm" else 1)
    fitting = [(one, label) for one, label in zip(found, labels, strict=True) if len(one.ids) >= least]
    notes = ""
    if rows.kind == "ids" and (longer := sum(len(ids) > length for _, ids in items)):
        notes += f", {longer} cut to {length} tokens"
    if rows.kind != "documents" and (left := len(rows.items) - len(fitting)):
        notes += f", {left} {'without text' if least < 2 else f'of fewer than {least} tokens'} left out"
    return fitting, notes


def _token_batches(
    samples: Sequence[tuple[Sample, Any]], takes: Signature, task: Task, size: int
) -> Iterator[dict[str, Tensor]]:
    from sparsec.training.losses import LABELS

    if task == "lm" and _DECODER in takes.axes:
        raise UsageError(
            f"{takes.words}: it reads one text and writes another, which the task lm is not for; give whole inputs and "
            "labels in Python, resources={...}"
        )
    by_length: dict[int, list[tuple[Sample, Any]]] = {}
    for sample, label in samples:
        by_length.setdefault(len(sample.ids), []).append((sample, label))
    for _, group in sorted(by_length.items()):
        batches, labels = takes.token_batches([sample for sample, _ in group], size), [label for _, label in group]
        for batch in batches:
            ids = batch[takes.ids or IDS]
            yield batch | (_labels(labels[: len(ids)]) if task != "lm" else {LABELS: ids.long()})
            del labels[: len(ids)]


def _picture_batches(rows: Rows, takes: Signature, tools: Tools, size: int) -> Iterator[dict[str, Tensor]]:
    """One batch after the other: beside the batches only one batch of pictures is in memory."""
    load, labels = picture_loader(takes, tools, rows.words), rows.labels or [None] * len(rows.items)
    size = takes.batch("pixel_values", size)
    for i in range(0, len(rows.items), size):
        made = takes.picture_batches([load(path) for _, path in rows.items[i : i + size]], size)
        yield from (batch | _labels(labels[i : i + size]) for batch in made)


def _labels(labels: Sequence[Any]) -> dict[str, Tensor]:
    import torch

    from sparsec.training.losses import BIAS, LABELS

    if isinstance(labels[0], tuple):
        labels, biased = zip(*labels, strict=True)
        return {LABELS: torch.tensor(labels), BIAS: torch.tensor(biased)}
    return {} if labels[0] is None else {LABELS: torch.tensor(labels)}  # int64, or float32
