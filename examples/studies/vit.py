"""A DeiT of 0.8 million parameters, trained here on pictures of CIFAR-10, then under 64:2:5 and 64:2:8."""

from __future__ import annotations

import io
import random
import zipfile
from dataclasses import dataclass

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassification

import sparsec
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Context, Program, data
from sparsec.training.batches import Batches, resolve
from sparsec.training.engine import Engine
from sparsec.training.loop import Loop
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.model import GraphModel
from sparsec.training.parts import Method
from sparsec.training.schedules import Once
from sparsec.training.settings import Settings
from sparsec.training.updates import Hard

ARCHIVE = "cifar10_jpg/cifar10_train20k_test10k.zip"
MODEL = DeiTConfig(
    image_size=32, patch_size=8, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
    attn_implementation="eager",  # the faster one at 18 tokens
)  # fmt: skip
DENSE = Settings(epochs=8, lr=1e-3, warmup=0.1, weight_decay=0.05)
ARM_PICTURES, FEW, CALIBRATED, JUDGED, BATCH, SHIFT = 6000, 1000, 256, 5000, 64, 4
Pictures = tuple[Tensor, Tensor]
"""(pictures, 3, 32, 32), bytes; and their classes."""


def pictures(place: Place, part: str) -> Pictures:
    """All of train or test, in an order that is always the same, and mixes the classes."""
    with zipfile.ZipFile(place.data / ARCHIVE) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{part}/"))
        classes = sorted({name.split("/")[1] for name in names})
        random.Random(0).shuffle(names)
        found = [numpy.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    of = torch.tensor([classes.index(name.split("/")[1]) for name in names])
    return torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2), of


def scaled(some: Tensor) -> Tensor:
    """About -2 to 2."""
    return (some.float() - 127.5) / 64


def augmented(some: Tensor, generator: torch.Generator) -> Tensor:
    """Each picture shifted by up to SHIFT pixels to every side, zeros coming in, and flipped in half of the cases."""
    count, size = len(some), some.shape[-1]
    padded = torch.nn.functional.pad(some, (SHIFT,) * 4)
    rows, cols = (torch.arange(size) + torch.randint(2 * SHIFT + 1, (count, 1), generator=generator) for _ in range(2))
    cols = torch.where(torch.rand(count, 1, generator=generator) < 0.5, cols.flip(1), cols)
    found = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return found.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Augmented(Batches):
    """Pictures that are augmented anew in every epoch."""

    def epoch(self, seed: int, number: int) -> list[dict[str, Tensor]]:
        found = super().epoch(seed, number)
        generator = torch.Generator().manual_seed(1000 * seed + number)
        return [{**batch, "pixel_values": augmented(batch["pixel_values"], generator)} for batch in found]


def batches(some: Tensor, labels: Tensor, size: int = BATCH) -> list[dict[str, Tensor]]:
    """Inputs with labels."""
    return [{"pixel_values": x, "labels": y} for x, y in zip(some.split(size), labels.split(size), strict=True)]


def start(seed: int, place: Place, held_out: bool = False) -> Start:
    """Train the model on all of train, or take what an earlier run kept; judge on half of test, or the other half.

    The sparse arms see pictures that the dense model has seen.
    """
    shown, labels = pictures(place, "train")
    shown = scaled(shown)
    program = _dense(seed, place, batches(shown, labels))
    tested, wanted = pictures(place, "test")
    judged = batches(*(part[-JUDGED:] if held_out else part[:JUDGED] for part in (scaled(tested), wanted)), size=250)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(shown), generator=generator)[:ARM_PICTURES]
    train = batches(augmented(shown[chosen], generator), labels[chosen])
    calibration = data.given([{"pixel_values": some} for some in shown[chosen[:CALIBRATED]].split(BATCH)])

    def judge(program: Program) -> dict[str, float]:
        right, loss = 0, 0.0
        with torch.no_grad():
            for batch in judged:
                logits = program(batch["pixel_values"])["logits"]
                right += int((logits.argmax(1) == batch["labels"]).sum())
                loss += float(torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        return {"accuracy": right / JUDGED, "loss": loss / JUDGED}

    few = train[: FEW // BATCH]
    return Start(program, {"train": train, "few": few, "calibration": calibration, "teacher": program}, judge)


def _dense(seed: int, place: Place, train: list[dict[str, Tensor]]) -> Program:
    torch.manual_seed(seed)
    model = DeiTForImageClassification(MODEL).eval()
    program = sparsec.trace(model, {"pixel_values": torch.zeros(2, 3, 32, 32)}, {"pixel_values": {0: "batch"}})
    kept = place.work / f"vit-{seed}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))  # the program has the same parameters
        return program
    found = resolve(Context(resources={"train": train}), "train", "dense", program, BATCH)
    made = Augmented(found.groups, found.size, found.sha256, found.samples)
    net = GraphModel(program, Objective((CrossEntropy(),)))
    Loop(net, Engine(program, Method(Once(), Hard())), made, DENSE, seed).run()
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), kept)
    return program


PATTERNS = ("64:2:5", "64:2:8")
STEPS = f"epochs=2, batch_size={BATCH}"
RATES = {"fixed-mask": "3e-4", "sr-ste": "3e-4"}
"""Of those tried in `vit_grid`, the most accurate."""


def trained(name: str, lr: str, more: str = "") -> str:
    """The pass at a rate."""
    return f"{name}{{{STEPS}, lr={lr}{', frozen_epochs=1' if name == 'sr-ste' else ''}{more}}}"


def sparse() -> dict[str, str]:
    """What is done under a pattern: names and passes, from no training to most of it; each permuted too."""
    made = {"mask": "mask | freeze", "oneshot": "oneshot"}
    made["fixed-mask, few"] = trained("fixed-mask", RATES["fixed-mask"], ", data=few")
    made |= {name: trained(name, lr) for name, lr in RATES.items()}
    return made | {"permute": "permute"} | {f"{name}, permuted": f"permute | {passes}" for name, passes in made.items()}


def arms(seed: int) -> list[Arm]:
    """The arms of a seed. The dense model is also trained on as long as the others, under 0.01 % of zeros."""
    further = Arm("dense, trained on", trained("fixed-mask", RATES["fixed-mask"]), "unstructured:0.0001", seed)
    return [Arm("dense", "", seed=seed), further, *(Arm(*arm, p, seed) for p in PATTERNS for arm in sparse().items())]


ARMS = [arm for seed in (0, 1, 2) for arm in arms(seed)]
STUDY = Study("vit", ARMS, start, ("accuracy",), "fixed-mask", "accuracy.md", keep=True)
