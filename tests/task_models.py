"""A tiny BERT with a real tokenizer, and rows of text that it can learn a label, or a score, of."""

from __future__ import annotations

import random
from pathlib import Path

GOOD, BAD = ("good", "fine", "great", "superb"), ("bad", "poor", "awful", "dull")
FILLERS = "the film plot book cast was is with and very quite story".split()
LETTERS = [f"{start}{letter}" for start in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz"]
WORDS = [*"[PAD] [UNK] [CLS] [SEP] [MASK]".split(), *GOOD, *BAD, *FILLERS, *LETTERS]


def bert(folder: Path, kind: str = "BertModel", words: list[str] = WORDS, **options: object) -> str:
    """A BERT of random weights, of the class `kind` of transformers, and its WordPiece tokenizer, in `folder`."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    transformers.BertTokenizer({word: i for i, word in enumerate(words)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes["max_position_embeddings"] = 32
    config = transformers.BertConfig(vocab_size=len(words), **{**sizes, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder)
    return str(folder)


def sentences(path: str, count: int, seed: int = 0, names: tuple[str, ...] = ("0", "1")) -> str:
    """A .csv of sentences with one word that tells their label."""
    order = random.Random(seed)
    rows = ["sentence,label"]
    for i in range(count):
        filler = [order.choice(FILLERS) for _ in range(order.choice((3, 5)))]
        filler.insert(order.randrange(len(filler)), order.choice((BAD, GOOD)[i % 2]))
        rows.append(f"{' '.join(filler)},{names[i % len(names)]}")
    Path(path).write_text("\n".join(rows) + "\n")
    return path
