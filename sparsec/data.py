"""Calibration data: from the DATA of a command, or from batches given in Python, to inputs of a program.

Nothing is padded: samples of one length form batches, so no statistic sees a token that stands for nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.encoding import Sample, encode, pack, pixels
from sparsec.errors import UsageError
from sparsec.signature import Signature
from sparsec.sources import IDS, Source, read
from sparsec.tables import Row

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

SAMPLES = LENGTH = 128  # what is asked for when nothing else is
log = logging.getLogger("sparsec")


@dataclass(frozen=True)
class Calibration:
    """Inputs of a model on which passes see what its layers see."""

    batches: tuple[dict[str, Tensor], ...]
    """Inputs by name; every batch holds samples of one length, without padding."""
    words: str
    """`128 samples of 128 tokens from docstrings of the Python standard library`."""
    sha256: str
    """Of the content: names, types, shapes and bytes, batch by batch."""
    samples: int


@dataclass(frozen=True)
class Request:
    """Which data, and how much of it. See `sources.read` for `source` and `columns`."""

    source: str = ""
    samples: int = SAMPLES
    length: int = LENGTH
    """Most tokens of a sample. The default is cut to what the model takes; any other is refused beyond that."""
    columns: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value in (("--num-calibration-samples", self.samples), ("--max-seq-length", self.length)):
            if value < 1:
                raise UsageError(f"{option} is {value}; expected a number of at least 1")


@dataclass(frozen=True)
class Tools:
    """What came with a model to make its inputs, beside the program itself."""

    tokenizer: Any = None
    images: Callable[[], Any] | None = None
    """Loads the image processor, or raises UsageError."""
    vocabulary: int | None = None
    given: Calibration | None = None
    """Batches from Python: taken instead of anything that is asked for."""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """Objects from Python that options of passes name."""


@dataclass
class Deferred:
    """Calibration data that is made when a pass first asks for it, once."""

    program: Program
    tools: Tools
    request: Request
    made: Calibration | None = field(default=None, init=False)
    """None until somebody asked."""

    def __call__(self) -> Calibration:
        """The data. Raises UsageError when there is none, or it does not fit the model."""
        if self.made is None:
            self.made = calibration(self.program, self.tools, self.request)
        return self.made

    @property
    def available(self) -> bool:
        """Whether there is data, or some by default; what was asked for may still turn out not to fit."""
        return not self.lacks

    @property
    def lacks(self) -> str:
        """Why there is none, and how to give some; empty where there is."""
        return "" if self.tools.given or self.request.source else _lacks(Signature.of(self.program), self.tools)

    def describe(self, by_default: bool = False) -> dict[str, Any]:
        """The manifest's part on it: nothing where no pass asked, which is logged if data was named.

        `by_default`: whether passes were chosen by there being data; then it says why there was none.
        """
        if by_default and self.lacks:
            return {"uncalibrated": self.lacks}
        if self.made is None:
            if self.request.source or self.tools.given:
                log.warning("no pass of the recipe looked at the calibration data; only passes such as oneshot do")
            return {}
        return {"calibration": {key: getattr(self.made, key) for key in ("words", "sha256", "samples")}}


def _lacks(takes: Signature, tools: Tools) -> str:
    if takes.ids is not None and tools.tokenizer is not None:
        return ""
    return (
        f"{takes.words} and has no tokenizer here, so there is no data by default; give --calib "
        f"{'a folder of pictures' if 'pixel_values' in takes.axes else f'a .jsonl of {IDS}'}, or in Python "
        "calibration=[inputs, ...]"
    )


def calibration(program: Program, tools: Tools, request: Request) -> Calibration:
    """The data that `request` asks for, as inputs of `program`: the same for the same seed and content.

    Raises UsageError when it cannot be read or does not fit. Fewer samples than asked for: `words` says so, and a log.
    """
    takes, order = Signature.of(program), random.Random(request.seed)
    if tools.given is not None:
        for i, batch in enumerate(tools.given.batches):
            takes.check(batch, f"calibration: batch {i}")
        return tools.given
    if not request.source and (lacks := _lacks(takes, tools)):
        raise UsageError(lacks)
    length = allowed_length(request.length, takes.most) if takes.ids else request.length
    source = read(request.source, request.columns, length, order)
    if source.kind == "pictures":
        batches, unit = _pictures(takes, tools, source, request.samples, order), "pictures"
    else:
        samples = _samples(takes, tools, source, request.samples, length, order)
        batches, unit = takes.token_batches(samples), unit_of(samples)
    count = sum(len(next(iter(batch.values()))) for batch in batches)
    if not count:
        raise UsageError(f"{source.words}: found no sample that the model can take; {takes.words}")
    fewer = f" ({request.samples} were asked for)" if count < request.samples else ""
    words = f"{count} {unit}{fewer} from {source.words}"
    if fewer:
        log.warning("calibration: %s", words)
    return Calibration(batches, words, content_hash(batches), count)


def given(batches: Iterable[Mapping[str, Tensor]]) -> Calibration:
    """Batches from Python as they stand. Raises UsageError for none, or for what is no dict of tensors."""
    import torch

    kept = tuple(dict(batch) if isinstance(batch, Mapping) else batch for batch in batches)
    for i, batch in enumerate(kept):
        if not isinstance(batch, dict) or not batch or not all(isinstance(v, torch.Tensor) for v in batch.values()):
            raise UsageError(f"calibration: batch {i} is a {type(batch).__name__}; expected a dict of input tensors")
    if not kept:
        raise UsageError("calibration: there are no batches; expected at least one dict of input tensors")
    count = sum(len(value) if value.dim() else 1 for value in (next(iter(batch.values())) for batch in kept))
    return Calibration(kept, f"{count} samples that were given in Python", content_hash(kept), count)


def content_hash(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """SHA-256 of names, types, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        digest.update(b"|")
    return digest.hexdigest()


def allowed_length(asked: int, most: int | None) -> int:
    """Tokens of a sample: what was asked for, or by default as many as the model takes."""
    if most is None or asked <= most:
        return asked
    if asked == LENGTH:
        return most
    raise UsageError(f"--max-seq-length {asked}: the model takes at most {most} tokens; give at most {most}")


def _samples(
    takes: Signature, tools: Tools, source: Source, count: int, length: int, order: random.Random
) -> list[Sample]:
    """`count` samples, or all there are, of lengths that the model takes."""
    items = source.items
    if source.kind != "documents":
        rows: list[Row] = list(items)
        if source.kind == "ids":
            check_ids(rows, takes, tools, source.words)
        order.shuffle(rows)
        items = rows
    found = samples_of(Source(source.kind, items, source.words), takes, tools, length)
    samples = list(itertools.islice((one for one in found if len(one.ids) >= takes.least), count))
    if source.kind != "ids":
        check_ids([("tokenized", one.ids) for one in samples], takes, tools, source.words)
    return samples


def samples_of(source: Source, takes: Signature, tools: Tools, length: int) -> Iterator[Sample]:
    """The samples of texts, documents or token ids, of at most `length` tokens. Raises UsageError where none fit."""
    if takes.ids is None:
        raise UsageError(f"{source.words} holds text or token ids; {takes.words}")
    if source.kind == "ids":
        return (Sample(ids[:length]) for _, ids in source.items)
    if tools.tokenizer is None:
        raise UsageError(
            f"{source.words} holds text, and the model has no tokenizer here; give token ids: a .jsonl with one "
            f'{{"{IDS}": [...]}} a line'
        )
    if source.kind == "documents":
        return pack(source.items, tools.tokenizer, length)
    return encode(list(source.items), tools.tokenizer, length)


def check_ids(rows: Iterable[tuple[str, list[int]]], takes: Signature, tools: Tools, name: str) -> None:
    """Raise UsageError for a token that the model does not have."""
    vocabulary = tools.vocabulary or takes.vocabulary
    for place, ids in rows:
        if vocabulary and max(ids) >= vocabulary:
            raise UsageError(
                f"{name}, {place}: found token id {max(ids)}; the model has {vocabulary} tokens, from 0 to "
                f"{vocabulary - 1}: these ids are another tokenizer's; make them with the model's own"
            )


def unit_of(samples: Sequence[Sample]) -> str:
    """`samples of 3 to 66 tokens`."""
    lengths = {len(one.ids) for one in samples}
    if len(lengths) < 2:
        return f"samples of {max(lengths, default=0)} tokens"
    return f"samples of {min(lengths)} to {max(lengths)} tokens"


def _pictures(
    takes: Signature, tools: Tools, source: Source, count: int, order: random.Random
) -> tuple[dict[str, Tensor], ...]:
    load, paths = picture_loader(takes, tools, source.words), list(source.items)
    order.shuffle(paths)
    return takes.picture_batches([load(path) for path in paths[:count]])


def picture_loader(takes: Signature, tools: Tools, words: str) -> Callable[[Path], tuple[str, Tensor]]:
    """What makes the model's input of a picture, named for errors. Raises UsageError where it takes no pictures."""
    if list(takes.axes) != ["pixel_values"]:
        raise UsageError(f"{words} holds pictures, which alone are no inputs of this model; {takes.words}")
    if tools.images is None:
        raise UsageError(
            f"{words} holds pictures, and the model has no image processor here; give whole inputs in Python, "
            "calibration=[inputs, ...]"
        )
    processor, gray = tools.images(), takes.axes["pixel_values"][1] == 1
    return lambda path: (str(path), pixels(path, processor, gray))
