"""MiniLM learns from its dense self on sentences without labels, under six patterns; judged by sentence embeddings."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from examples.studies.sst2 import rows
from examples.studies.study import Arm, Place, Start, Study
from sparsec import Program, data, quality
from sparsec.loaded import Loaded
from sparsec.models import load_model

Batches = tuple[dict[str, torch.Tensor], ...]
Run = Callable[..., dict[str, torch.Tensor]]
LENGTH, TRAINED, CALIBRATED, JUDGED = 32, 1200, 256, 500  # tokens of a sentence at most, and sentences


def start(seed: int, place: Place, held_out: bool = False) -> Start:
    """The model as it is; judged by its embeddings of SST-2's dev and test, or of WikiSplit's sentences.

    Which of these are judged is the same for all seeds; what is trained and calibrated on, the seed draws.
    """
    loaded = load_model("demo:minilm")
    for name, parameter in loaded.program.module.named_parameters():
        parameter.requires_grad_("embeddings" not in name)
    train = sentences(loaded, place, "tune", TRAINED, seed)
    calibration = data.given(sentences(loaded, place, "tune", CALIBRATED, seed))
    judged = sentences(loaded, place, "validation", JUDGED, 0) if held_out else sst2(loaded, place)
    with torch.no_grad():
        expected = [loaded.program(**batch) for batch in judged]

    def judge(program: Run) -> dict[str, float]:
        given = iter(expected)
        found = quality.measure(program, lambda **inputs: next(given), judged)
        assert found.embedding is not None
        return {"embedding": found.embedding, "vector": found.cosine}

    resources = {"train": train, "calibration": calibration, "teacher": loaded.program}
    return Start(loaded.program, resources, judge)


def sentences(loaded: Loaded, place: Place, name: str, count: int, seed: int) -> Batches:
    """Some of WikiSplit's sentences; those of one length form batches."""
    path = place.data / "wikisplit" / f"{name}.tsv"
    request = data.Request(str(path), samples=count, length=LENGTH, columns=("0",), seed=seed)
    return data.calibration(loaded.program, loaded.tools, request).batches


def sst2(loaded: Loaded, place: Place) -> Batches:
    """Some of SST-2's dev and test, whole; those of one length form batches."""
    texts = [text for name in ("dev", "test-labeled") for text, _ in rows(place.data, name)]
    groups: dict[int, list[list[int]]] = {}
    for ids in loaded.tools.tokenizer(random.Random(0).sample(texts, JUDGED))["input_ids"]:
        groups.setdefault(len(ids), []).append(ids)
    return tuple(inputs(loaded.program, torch.tensor(group)) for group in groups.values())


def inputs(program: Program, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model takes beside token ids, none masked."""
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in program.inputs}


PATTERNS = ("2:4", "64:2:5", "64:2:6", "64:2:8", "64:2:16", "64:2:8@strip")
PERMUTED = ("64:2:5", "64:2:8")


def training(lr: str) -> str:
    """The pass at a rate."""
    return f"fixed-mask{{epochs=1, batch_size=8, lr={lr}, loss=none, distill=1, teacher=teacher}}"


TRAINING = training("3e-4")
"""Of the rates tried in `distilled_grid`, the best."""
PERMUTE = "permute{mode=kernel}"


def arms(seed: int) -> list[Arm]:
    """What is done under each pattern. Magnitude sees no data: one seed is all seeds."""
    made = {"magnitude": "mask | freeze"} if not seed else {}
    made |= {"oneshot": "oneshot", "trained": f"oneshot | {TRAINING}"}
    permuted = {"permuted, oneshot": f"{PERMUTE} | oneshot", "permuted, trained": f"{PERMUTE} | oneshot | {TRAINING}"}
    found = [Arm(*arm, pattern, seed) for pattern in PATTERNS for arm in made.items()]
    return found + [Arm(*arm, pattern, seed) for pattern in PERMUTED for arm in permuted.items()]


ARMS = [arm for seed in (0, 1, 2) for arm in arms(seed)]
STUDY = Study("distilled", ARMS, start, ("embedding", "vector"), "oneshot", "accuracy.md", keep=True)
