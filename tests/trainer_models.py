"""A tiny BERT that learns a label of sentences under the transformers Trainer, also as one of several processes.

python -m torch.distributed.run --nproc-per-node 2 tests/trainer_models.py OUT BATCH
"""

from __future__ import annotations

import functools
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from task_models import BAD, FILLERS, GOOD, WORDS
from torch import Tensor

from sparsec.program import Program
from sparsec.tracing import trace
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.parts import Method
from sparsec.training.schedules import Cubic, Once, Repeated
from sparsec.training.trainer import SparseTrainer
from sparsec.training.updates import Hard, Penalty, StraightThrough

METHODS = {
    "fixed-mask": Method(Once(), Hard()),
    "admm": Method(Repeated(2), Penalty(0.01)),
    "sr-ste": Method(Repeated(2), StraightThrough(2e-4)),
    "gradual": Method(Cubic(0.0, 0.6, 2), Hard()),
}
PATTERNS = {"fixed-mask": "unstructured:0.75", "admm": "2:4", "sr-ste": "1:4", "gradual": "4:2:8"}
LENGTH = 8


def model(dropout: float = 0.1) -> Any:
    """The classifier, of random weights."""
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=LENGTH, **sizes, **rates)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).eval()


@functools.cache
def classifier(dropout: float = 0.1) -> Program:
    """Its program: to be cloned, never written."""
    return trace(model(dropout), {name: torch.stack([row[name] for row in rows(2)]) for name in INPUTS})


INPUTS = ("input_ids", "attention_mask")


def rows(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Sentences, padded, in which one word tells the label."""
    order, made = random.Random(seed), []
    for i in range(count):
        words = [*order.choices(FILLERS, k=order.choice((3, 5))), order.choice((BAD, GOOD)[i % 2])]
        order.shuffle(words)
        ids = [WORDS.index(word) for word in ("[CLS]", *words, "[SEP]")]
        ids += [0] * (LENGTH - len(ids))
        made.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(i % 2)})
        made[-1]["attention_mask"] = (made[-1]["input_ids"] != 0).long()
    return made


def arguments(folder: Path, **options: Any) -> Any:
    """TrainingArguments: two epochs of six steps."""
    from transformers import TrainingArguments

    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
    short = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 0.01, "weight_decay": 0.1}
    return TrainingArguments(output_dir=str(folder), **{"save_strategy": "no", **quiet, **short, **options})


def trainer(
    folder: Path, method: str | Method, pattern: str = "2:4", program: Program | None = None, **options: Any
) -> Any:
    """A SparseTrainer on 96 sentences; `options` go to TrainingArguments, those it takes itself excepted."""
    own = {name: options.pop(name) for name in ("callbacks", "compute_metrics", "train_dataset") if name in options}
    program = program or classifier()
    targets = program.replace(sites=program.sites.with_targets({"*": pattern}))
    chosen = METHODS[method] if isinstance(method, str) else method
    data = {"train_dataset": rows(96), "eval_dataset": rows(10, seed=1), **own}
    return SparseTrainer(targets, chosen, Objective((CrossEntropy(),)), arguments(folder, **options), **data)


def gradients(made: Any) -> dict[str, Tensor]:
    """What the optimizer of a Trainer is given in its first step: put there while it trains."""
    found: dict[str, Tensor] = {}
    plain = made.engine.pre_step

    def pre_step() -> None:
        plain()
        if not found:
            found.update(
                {n: value.grad.clone() for n, value in made.model.named_parameters() if value.grad is not None}
            )

    made.engine.pre_step = pre_step
    return found


def main(out: str, batch: str) -> None:
    """Train by every method as one of several processes; writes what each rank was given and what it was left with."""
    torch.set_num_threads(1)
    kept: dict[str, Tensor] = {}
    for method, pattern in PATTERNS.items():
        made = trainer(Path(out), method, pattern, classifier(0.0), per_device_train_batch_size=int(batch))
        first = gradients(made)
        made.train()
        kept |= {f"{method} mask {one.site.name}": one.tensors["mask"] for one in made.engine.sites}
        kept |= {f"{method} weight {name}": value.detach() for name, value in made.model.named_parameters()}
        kept |= {f"{method} gradient {name}": value for name, value in first.items()}
        made.finish()  # checks the pattern
    save_file(kept, Path(out) / f"rank{made.args.process_index}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
