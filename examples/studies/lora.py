"""A Llama of 0.9 million parameters that tells stories: three-stage LoRA against one-shot pruning at 64:2:5."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor

from examples.studies.study import Arm, Place, Start, Study
from sparsec import Program, data
from sparsec.models import load_model

MODEL = "model_babyllama105"
TRAINED = 96
"""Lines of calibration.jsonl, of 128, drawn by the seed: for calibration as for training."""


def lines(data: Path, name: str) -> Tensor:
    """Token ids, [lines, 200]."""
    texts = (data / MODEL / f"{name}.jsonl").read_text().splitlines()
    return torch.tensor([json.loads(text)["input_ids"] for text in texts])


def start(seed: int, place: Place, held_out: bool = False) -> Start:
    """The model as it is; judged by its loss on validation.jsonl, or on what the seed did not draw."""
    program = load_model(str(place.data / MODEL / "hf")).program
    ids = lines(place.data, "calibration")
    ids = ids[random.Random(seed).sample(range(len(ids)), len(ids))]
    chosen = ids[:TRAINED].split(8)
    judged_on = (ids[TRAINED:] if held_out else lines(place.data, "validation")).split(8)

    def inputs(some: Tensor) -> dict[str, Tensor]:
        return {name: {"input_ids": some, "attention_mask": torch.ones_like(some)}[name] for name in program.inputs}

    def judge(program: Program) -> dict[str, float]:
        with torch.no_grad():
            losses = [
                torch.nn.functional.cross_entropy(program(**inputs(some))["logits"][:, :-1].mT, some[:, 1:])
                for some in judged_on
            ]
        return {"NLL": float(torch.stack(losses).mean())}

    train = [inputs(some) for some in chosen]
    return Start(program, {"train": train, "calibration": data.given(train), "teacher": program}, judge)


STEPS = "epochs=20, batch_size=8, loss=lm"


def lora(rate: str, rank: int, more: str = "") -> str:
    """The pass at a rate of its adapters; norms are trained at a tenth of it."""
    return f"three-stage-lora{{{STEPS}, lr={float(rate) / 10:g}, adapter_lr={rate}, rank={rank}{more}}}"


RATE, RANK = "1e-3", 64
"""Of those tried in `lora_grid`, the best."""
PASSES = {
    "magnitude": "mask | freeze",
    "RIA": "oneshot{solver=none, score=ria}",
    "SparseGPT": "oneshot{solver=sparsegpt}",
    "ALPS": "oneshot",
    "three-stage-lora": lora(RATE, RANK),
    "three-stage-lora, KD": lora(RATE, RANK, ", distill=1"),
    "fixed-mask": f"fixed-mask{{{STEPS}, lr=1e-3}}",
    "fixed-mask, KD": f"fixed-mask{{{STEPS}, lr=1e-3, distill=1}}",
}
ARMS = [Arm("dense", "", seed=seed) for seed in (0,)]
ARMS += [Arm(*arm, "64:2:5", seed) for seed in (0, 1, 2) for arm in PASSES.items()]
ON_CPU = "loads its model to the CPU, where SparseGPT runs"
STUDY = Study("lora", ARMS, start, ("NLL",), on_cpu=ON_CPU)
