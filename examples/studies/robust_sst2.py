"""MiniLM on SST-2, phrases of film reviews: which subnetworks still judge reviews of other things than films?

The arms of `robust`, fewer, at one rate of scores. Reviews of films on DVD are among the others: they are as long, and
written by customers, as those of books, devices, kitchenware and flights.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse import csr_matrix
from scipy.special import expit
from torch import Tensor

from examples.studies import minilm, ranking, robust, sst2
from examples.studies.minilm import Row
from examples.studies.robust import PATTERNS, START_STEPS, masks, rounds
from examples.studies.study import Arm, Line, Place, Start, Study
from sparsec import Program
from sparsec.training.debiasing import ProductOfExperts
from sparsec.training.losses import CrossEntropy

DOMAINS = ("airline", "books", "dvd", "electronics", "kitchen")
JUDGED_SST2, JUDGED_EACH = 700, 80  # of each domain and label
ARM_ROWS = 480


def reviews(data: Path, domain: str, name: str) -> list[Row]:
    """Of one of the set's files; 1: they are good. A review may have several lines, in quotation marks."""
    with (data / "blitzer_sentiment" / f"{domain}_{name}.tsv").open(newline="") as file:
        return [Row((row["sentence"],), int(row["label"])) for row in csv.DictReader(file, delimiter="\t")]


def domains(data: Path) -> tuple[dict[str, list[Row]], list[Row]]:
    """Those that are judged, as many of each domain and label, and others, none of them the same; fixed, not drawn."""
    judged = {}
    for domain in DOMAINS:
        mixed = random.Random(0).sample(rows := reviews(data, domain, "dev"), len(rows))
        judged[domain] = [row for label in (0, 1) for row in [r for r in mixed if r.label == label][:JUDGED_EACH]]
    taken = {row.texts for rows in judged.values() for row in rows}
    others = [row for domain in DOMAINS for row in reviews(data, domain, "train") if row.texts not in taken]
    return judged, others


def unigrams(fitted: Sequence[tuple[str, int]], asked: Sequence[str]) -> list[tuple[float, ...]]:
    """Log-probabilities of both classes for the texts that are asked about: which words a text has, and nothing else.

    A logistic regression, fitted to other texts by L-BFGS from zero; beside the sum of losses half the sum of squares
    of the weights. Words that were not fitted count nothing.
    """
    places = {word: i for i, word in enumerate(sorted({word for text, _ in fitted for word in text.split()}))}

    def table(texts: Sequence[str]) -> csr_matrix:
        there = [(i, places[word]) for i, text in enumerate(texts) for word in set(text.split()) if word in places]
        rows, columns = zip(*there, strict=True) if there else ((), ())
        return csr_matrix((np.ones(len(there)), (rows, columns)), (len(texts), len(places)))

    x, sign = table([text for text, _ in fitted]), np.array([2.0 * label - 1 for _, label in fitted])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ weights[:-1] + weights[-1])
        value = np.logaddexp(0, -margin).sum() + weights[:-1] @ weights[:-1] / 2
        slope = -sign * expit(-margin)
        return float(value), np.append(x.T @ slope + weights[:-1], slope.sum())

    weights = minimize(loss, np.zeros(len(places) + 1), jac=True, method="L-BFGS-B").x
    found = table(asked) @ weights[:-1] + weights[-1]
    return list(zip((-np.logaddexp(0, found)).tolist(), (-np.logaddexp(0, -found)).tolist(), strict=True))


def start(seed: int, place: Place) -> Start:
    """The dense model of `sst2`, and one that is trained with PoE on the same rows, or what an earlier run kept.

    The bias model is fitted to as many other rows of train.tsv. The sparse arms are trained on a part of what the dense
    models have seen, or (`ood`) on as many reviews that are not judged.
    """
    mixed = sst2.rows(place.data, "train")
    random.Random(seed).shuffle(mixed)
    own, others = mixed[: sst2.DENSE_ROWS], mixed[sst2.DENSE_ROWS : 2 * sst2.DENSE_ROWS]
    bias = unigrams(others, [text for text, _ in own])
    seen = [Row((text,), label, known) for (text, label), known in zip(own, bias, strict=True)]
    both = sst2.rows(place.data, "dev") + sst2.rows(place.data, "test-labeled")
    judged, free = domains(place.data)
    test = [Row((text,), label) for text, label in random.Random(0).sample(both, JUDGED_SST2)]
    judges = {name: minilm.batches(rows, 64, place.device) for name, rows in {"ID": test, **judged}.items()}
    ood = minilm.batches(random.Random(seed).sample(free, ARM_ROWS), 64, place.device)
    resources = {"train": minilm.batches(seen[:ARM_ROWS], 64, place.device), "ood": ood}

    def judge(program: Program) -> dict[str, float]:
        return scores({name: minilm.answers(program, some) for name, some in judges.items()})

    all_seen = minilm.batches(seen, 64, place.device)
    dense = {
        name: minilm.dense(place.work / f"{name}-{seed}.safetensors", seed, all_seen, sst2.DENSE, loss, place.device)
        for name, loss in {"sst2": CrossEntropy(), "robust_sst2-poe": ProductOfExperts()}.items()
    }
    return Start(dense["sst2"], resources, judge, {"dense, PoE": dense["robust_sst2-poe"]})


def scores(found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracies in distribution, of all domains together and of each, and how well all are ranked."""
    logits, labels = (torch.cat([found[name][i] for name in DOMAINS]) for i in (0, 1))
    shown = {"ID": found["ID"], "OOD": (logits, labels)} | {name: found[name] for name in DOMAINS}
    accuracies = {name: minilm.metrics(*one)["accuracy"] for name, one in shown.items()}
    return accuracies | {"OOD AUC": robust.auc(logits, labels)}


SCORE_LR, LR = ranking.CALMER, robust.LR
"""Fixed before the first run: the rate of scores at which no training of `ranking` had collapsed, on the same data."""
PASSES = {"mask": "mask | freeze"}
for loss, more in {"": "", ", PoE": ", loss=poe"}.items():
    PASSES |= {f"mask training{loss}": masks(SCORE_LR, more), f"IMP{loss}": rounds(LR, more)}
MORE = {"mask training, OOD data": masks(SCORE_LR, ", data=ood")}
MORE |= {f"mask training, PoE, from step {k}": masks(SCORE_LR, f", loss=poe, start_step={k}") for k in START_STEPS}
ARMS = [
    Arm(*arm, pattern, seed)
    for seed in (0, 1, 2)
    for pattern, arms in {
        "": {"dense": "", "dense, PoE": ""},
        **{pattern: PASSES | (MORE if pattern == "unstructured:0.7" else {}) for pattern in PATTERNS},
    }.items()
    for arm in arms.items()
]


def plot(lines: Sequence[Line], folder: Path) -> None:
    """All arms, into robust_sst2.svg."""
    robust.scatter(lines, folder, "robust_sst2", ARMS, ("SST-2", "other reviews"), (0.65, 0.8))


STUDY = Study("robust_sst2", ARMS, start, ("ID", "OOD", "OOD AUC"), "dense", page="accuracy.md", plot=plot)
