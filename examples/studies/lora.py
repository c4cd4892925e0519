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


def start(seed: int, place: Place) -> Start:
    """The model as it is; judged by its loss on validation.jsonl."""
    program = load_model(str(place.data / MODEL / "hf")).program
    ids, judged_on = lines(place.data, "calibration"), lines(place.data, "validation").split(8)
    chosen = ids[random.Random(seed).sample(range(len(ids)), TRAINED)].split(8)

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
TUNED = f"lr=1e-3, {STEPS}"
PASSES = {
    "magnitude": "mask | freeze",
    "RIA": "oneshot{solver=none, score=ria}",
    "SparseGPT": "oneshot{solver=sparsegpt}",
    "ALPS": "oneshot",
    "three-stage-lora": f"three-stage-lora{{{TUNED}, adapter_lr=3e-3}}",
    "three-stage-lora, KD": f"three-stage-lora{{{TUNED}, adapter_lr=3e-3, distill=1}}",
    "fixed-mask": f"fixed-mask{{{TUNED}}}",
}
ARMS = [Arm("dense", "", seed=seed) for seed in (0,)]
ARMS += [Arm(*arm, "64:2:5", seed) for seed in (0, 1, 2) for arm in PASSES.items()]
STUDY = Study("lora", ARMS, start, ("NLL",))
