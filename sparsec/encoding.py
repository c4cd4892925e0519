"""Texts to samples of token ids, pictures to pixels: by the model's own tokenizer and image processor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 64  # encoded at once: tokenizers work in parallel inside a call


@dataclass(frozen=True)
class Sample:
    """One sequence; `types` tells the two texts of a pair apart, where the tokenizer does."""

    ids: list[int]
    types: list[int] | None = None


def pack(documents: Iterable[str], tokenizer: Any, length: int) -> Iterator[Sample]:
    """Documents one after the other, cut into samples of `length` tokens, each with the tokenizer's special tokens.

    What is left at the end is dropped. Raises UsageError when the special tokens leave no room.
    """
    left: list[int] = []
    ends: tuple[list[int], list[int]] | None = None
    room = length
    for document in documents:
        left += _ids(tokenizer, (document + "\n",), special=False)
        if ends is None and left:
            ends = _special_ends(tokenizer, document)
            room = _check_room(length, 1, [*ends[0], *ends[1]], [])
        while ends is not None and len(left) >= room:
            yield Sample([*ends[0], *left[:room], *ends[1]])
            left = left[room:]


def _check_room(length: int, texts: int, full: list[int], bare: list[int]) -> int:
    """How many tokens of text a sample has, which must be one of each text."""
    special = len(full) - len(bare)
    if length - special < texts:
        raise UsageError(
            f"--max-seq-length {length}: the tokenizer adds {special} special tokens to every sample; give at least "
            f"{special + texts}"
        )
    return length - special


def _ids(tokenizer: Any, texts: tuple[str, ...], special: bool) -> list[int]:
    found: list[int] = tokenizer(*texts, add_special_tokens=special)["input_ids"]
    return found


def _special_ends(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare, full = _ids(tokenizer, (text,), special=False), _ids(tokenizer, (text,), special=True)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise UsageError(
        f"the {type(tokenizer).__name__} puts special tokens inside a text, so long text cannot be cut for it; give "
        "rows of text (.csv, .tsv, .jsonl) or token ids (.jsonl with input_ids)"
    )


def encode(rows: Sequence[tuple[str, tuple[str, ...]]], tokenizer: Any, length: int) -> Iterator[Sample]:
    """A sample for each row of one or two texts that are not empty, cut to `length` tokens."""
    full = [texts for _, texts in rows if any(text.strip() for text in texts)]
    if full:
        _check_room(
            length, len(full[0]), _ids(tokenizer, full[0], special=True), _ids(tokenizer, full[0], special=False)
        )
    for start in range(0, len(full), _ROWS):
        columns = [list(texts) for texts in zip(*full[start : start + _ROWS], strict=True)]
        found = tokenizer(*columns, truncation=True, max_length=length, padding=False)
        types = found.get("token_type_ids") or [None] * len(found["input_ids"])
        yield from map(Sample, found["input_ids"], types)


def pixels(path: Path, processor: Any, gray: bool) -> Tensor:
    """The picture as the model takes it: (channels, height, width). Raises UsageError naming the file."""
    try:
        from PIL import Image
    except ImportError:
        raise UsageError(f"{path.name}: reading pictures needs more: pip install pillow") from None
    try:
        with Image.open(path) as image:
            loaded = image.convert("L" if gray else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is no picture that can be read: {error}; repair it or take it away") from error
    found: Tensor = processor(images=[loaded], return_tensors="pt")["pixel_values"]
    return found[0]
