"""Small models that take token ids or pictures, and tokenizers for them, made on the spot."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import Tensor, nn

from sparsec.program import Program
from sparsec.tracing import trace

WORDS = "[UNK] [CLS] [SEP] one two three four five six seven eight nine ten".split()
VOCABULARY, LIMIT = len(WORDS), 12


class Words(nn.Module):
    """What a BERT takes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.out = nn.Embedding(VOCABULARY, 4), nn.Embedding(2, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.out(self.words(input_ids) + self.kinds(token_type_ids)) * attention_mask[..., None]


class Seq2Seq(nn.Module):
    """What a T5 takes."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return self.out(self.words(decoder_input_ids) + self.words(input_ids).mean(1, keepdim=True))


class Pixels(nn.Module):
    """What a ViT takes."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(3 * 4 * 4, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.out(pixel_values.flatten(1))


def words_program() -> Program:
    names = ("input_ids", "token_type_ids", "attention_mask")
    inputs = {name: torch.ones(2, 5, dtype=torch.int64) for name in names}
    return trace(models.made(Words), inputs, {name: {0: "batch", 1: "length"} for name in names}, {"length": LIMIT})


def fixed_program(batch: bool = False) -> Program:
    """Sequences of 6 tokens; with `batch` also only in batches of 2."""
    inputs = {"tokens": torch.ones(2, 6, dtype=torch.int64)}
    return trace(models.made(Tokens), inputs, {} if batch else {"tokens": {0: "batch"}})


class Tokens(nn.Module):
    """Token ids under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.words(tokens))


def seq2seq_program() -> Program:
    inputs = {name: torch.ones(2, 4, dtype=torch.int64) for name in ("input_ids", "decoder_input_ids")}
    dynamic = {"input_ids": {0: "batch", 1: "length"}, "decoder_input_ids": {0: "batch", 1: "decoder_length"}}
    return trace(models.made(Seq2Seq), inputs, dynamic)


def pixels_program() -> Program:
    return trace(models.made(Pixels), {"pixel_values": torch.zeros(2, 3, 4, 4)})


def tokenizer(special: bool = True) -> Any:
    """A word is a token; with `special`, [CLS] and [SEP] around a text and between two."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(kinds.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", model_input_names=names)
