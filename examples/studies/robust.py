"""MiniLM on entailment, SICK and RTE: which subnetworks still judge well on HANS, where overlap of words misleads?"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from examples.studies import minilm
from examples.studies.minilm import Row
from examples.studies.study import Arm, Line, Place, Start, Study
from sparsec import Program
from sparsec.training import overlap
from sparsec.training.debiasing import ProductOfExperts
from sparsec.training.loop import Settings
from sparsec.training.losses import CrossEntropy

DENSE = Settings(epochs=2, lr=2e-4, warmup=0.1)
LENGTH = 48  # rows with more tokens are left out, everywhere
DENSE_ROWS = {"SICK": 2000, "RTE": 300}
ARM_ROWS, JUDGED_SICK, JUDGED_HANS = 480, 500, 1500


def read(path: Path, names: Sequence[str], entailed: str) -> list[Row]:
    """The short pairs of a table; 1: the first entails the second."""
    rows = [Row((first, second), int(label == entailed)) for first, second, label in minilm.columns(path, *names)]
    return minilm.fitting(rows, LENGTH)


def sick(data: Path, name: str) -> list[Row]:
    return read(data / "sick" / f"SICK_{name}.txt", ("sentence_A", "sentence_B", "entailment_judgment"), "ENTAILMENT")


def rte(data: Path, name: str) -> list[Row]:
    return read(data / "rte" / f"{name}.tsv", ("sentence1", "sentence2", "label"), "entailment")


def hans(data: Path) -> tuple[list[Row], list[Row]]:
    """Those that are judged, as many of each label and heuristic, and the others; the same for all seeds."""
    path = data / "hans_regen" / "hans_regen_9000.tsv"
    groups: dict[tuple[str, str], list[Row]] = {}
    for first, second, label, heuristic in minilm.columns(path, "premise", "hypothesis", "label", "heuristic"):
        groups.setdefault((label, heuristic), []).append(Row((first, second), int(label == "entailment")))
    mixed = [random.Random(0).sample(group, len(group)) for _, group in sorted(groups.items())]
    share = JUDGED_HANS // len(mixed)
    return [row for group in mixed for row in group[:share]], [row for group in mixed for row in group[share:]]


def biased(rows: Sequence[Row]) -> list[Row]:
    """With the answers of a bias model that is fitted to the overlap of their words."""
    pairs, labels = [(row.texts[0], row.texts[1]) for row in rows], [int(row.label) for row in rows]
    found = overlap.log_probabilities(pairs, labels, 2)
    return [replace(row, bias=tuple(bias)) for row, bias in zip(rows, found.tolist(), strict=True)]


def start(seed: int, place: Place) -> Start:
    """Fine-tune MiniLM on parts of SICK and RTE, or take what an earlier run kept.

    In distribution it is judged on rows of SICK's test file and RTE's dev.tsv. The sparse arms are trained on a part of
    what the dense models have seen, or (`ood`) on as many rows of HANS.
    """
    mixed = {"SICK": sick(place.data, "train"), "RTE": rte(place.data, "train")}
    for rows in mixed.values():
        random.Random(seed).shuffle(rows)
    seen = biased([row for name, rows in mixed.items() for row in rows[: DENSE_ROWS[name]]])
    random.Random(seed).shuffle(seen)
    judged_hans, others = hans(place.data)
    test = random.Random(0).sample(sick(place.data, "test_annotated"), JUDGED_SICK)
    judged_on = {"SICK": test, "RTE": rte(place.data, "dev"), "HANS": judged_hans}
    judges = {name: minilm.batches(rows, 64, place.device) for name, rows in judged_on.items()}
    train, ood = seen[:ARM_ROWS], random.Random(seed).sample(others, ARM_ROWS)
    resources = {"train": minilm.batches(train, 64, place.device), "ood": minilm.batches(ood, 64, place.device)}

    def judge(program: Program) -> dict[str, float]:
        return scores({name: minilm.answers(program, some) for name, some in judges.items()})

    all_seen = minilm.batches(seen, 64, place.device)
    dense = {
        name: minilm.dense(place.work / f"robust-{name}-{seed}.safetensors", seed, all_seen, DENSE, loss, place.device)
        for name, loss in {"ce": CrossEntropy(), "poe": ProductOfExperts()}.items()
    }
    return Start(dense["ce"], resources, judge, {"dense, PoE": dense["poe"]})


def scores(found: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Accuracies, and of HANS the share of pairs of an entailed row and another in which the entailed one is surer."""
    right = {name: logits.argmax(1) == labels for name, (logits, labels) in found.items()}
    logits, labels = found["HANS"]
    shown = {"ID": torch.cat([right["SICK"], right["RTE"]]), "OOD": right["HANS"], "SICK": right["SICK"]}
    shown |= {"RTE": right["RTE"], "OOD entailed": right["HANS"][labels == 1], "OOD not": right["HANS"][labels == 0]}
    return {name: float(one.double().mean()) for name, one in shown.items()} | {"OOD AUC": auc(logits, labels)}


def auc(logits: Tensor, labels: Tensor) -> float:
    """Of pairs of a row of class 1 and one of class 0, the share in which the first is the surer one; even: a half."""
    surer = logits[labels == 1].diff()[:, 0, None] - logits[labels == 0].diff()[None, :, 0]
    return float((surer.sign() + 1).double().mean() / 2)


STEPS = "epochs=2, batch_size=8"
SCORE_LR, LR = "1e-3", "2e-4"
"""Chosen for SST-2 in `ranking_grid`, not here."""
CALMER = "1e-4"
"""A rate of scores that was added when masks trained at the first were worse than untrained ones."""
PATTERNS = ("unstructured:0.5", "unstructured:0.7", "2:4")
START_STEPS = (30, 60)  # of 120; the arms without have 0


def masks(rate: str, more: str = "") -> str:
    """Pass text."""
    return f"mask-training{{{STEPS}, score_lr={rate}, every=4{more}}}"


def rounds(rate: str, more: str = "") -> str:
    """Pass text."""
    return f"imp{{{STEPS}, lr={rate}{more}}}"


PASSES = {
    "mask": "mask | freeze",
    "mask training": masks(SCORE_LR),
    "mask training, PoE": masks(SCORE_LR, ", loss=poe"),
    "IMP": rounds(LR),
    "IMP, PoE": rounds(LR, ", loss=poe"),
}
CALM = {f"mask training{loss}, {CALMER}": masks(CALMER, more) for loss, more in {"": "", ", PoE": ", loss=poe"}.items()}
MORE = {f"mask training, OOD data, {CALMER}": masks(CALMER, ", data=ood")}
for k in START_STEPS:
    MORE[f"mask training, PoE, {CALMER}, from step {k}"] = masks(CALMER, f", loss=poe, start_step={k}")
ARMS = [Arm(name, "", seed=seed) for seed in (0, 1, 2) for name in ("dense", "dense, PoE")]
ARMS += [Arm(*arm, pattern, seed) for seed in (0, 1, 2) for pattern in PATTERNS for arm in (PASSES | CALM).items()]
ARMS += [Arm(*arm, "unstructured:0.7", seed) for seed in (0, 1, 2) for arm in MORE.items()]
ARMS.sort(key=lambda arm: arm.seed)  # a seed's models are made once


def scatter(
    lines: Sequence[Line],
    folder: Path,
    name: str,
    arms: Sequence[Arm],
    sets: tuple[str, str],
    shown: tuple[float, float],
) -> None:
    """In distribution against out of it: the mean of each arm over its seeds, and what the claim is about as lines.

    `sets`: what the two are. `shown`: accuracies out of distribution that the plot reaches to at least, so that what is
    within the standard error looks like it.
    """
    import matplotlib
    from matplotlib.figure import Figure

    known = {(arm.arm, arm.passes, arm.pattern, arm.seed) for arm in arms}
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        if (line["arm"], line["passes"], line["pattern"], line["seed"]) in known:
            groups.setdefault((line["pattern"], line["arm"]), []).append(line["metrics"])
    colours = dict(zip(dict.fromkeys(arm for _, arm in groups), matplotlib.colormaps["tab20"].colors, strict=False))
    shapes = dict(zip(("", *PATTERNS), "*os^", strict=True))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sparsec", "font.size": 9}):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        panel = figure.subplots()
        for (pattern, arm), own in groups.items():
            x, y = (statistics.mean(one[metric] for one in own) for metric in ("ID", "OOD"))
            if (pattern, arm) == ("", "dense"):
                panel.axvline(0.95 * x, color="#999", linewidth=0.8, linestyle=":")
                panel.axhline(y, color="#999", linewidth=0.8, linestyle=":")
            panel.scatter(x, y, s=150 if not pattern else 55, marker=shapes[pattern], color=colours[arm], alpha=0.85)
        handles = [panel.scatter([], [], color=colour, label=arm) for arm, colour in colours.items()]
        handles += [panel.scatter([], [], color="#555", marker=shapes[one], label=one or "dense") for one in shapes]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
        panel.set(xlabel=f"accuracy in distribution ({sets[0]})", ylabel=f"accuracy out of distribution ({sets[1]})")
        low, high = panel.get_ylim()
        panel.set_ylim(min(low, shown[0]), max(high, shown[1]))
        panel.spines[["top", "right"]].set_visible(False)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def plot(lines: Sequence[Line], folder: Path) -> None:
    """All arms, into robust.svg."""
    scatter(lines, folder, "robust", ARMS, ("SICK, RTE", "HANS"), (0.4, 0.6))


STUDY = Study("robust", ARMS, start, ("ID", "OOD", "OOD AUC"), "dense", page="accuracy.md", plot=plot)
