"""Channel permutation: score kept, seconds, and what it does to outputs. Exit status 1 where a target is missed.

kept        MiniLM's layer 2, each matrix alone: both sides permuted, and strips with their rows assigned
sites       all 36 sites of MiniLM by the permute pass, graph and kernel mode
published   2:4 on numpy's rand(128, 64) of seed 1: share of the way to the best half of every row
outputs     MiniLM pruned in one shot with and without permutation, on the same calibration data
sizes       seconds of a layer by its size, random weights

Seconds are processor seconds of one thread; those of `sites` are by the clock, with two. Run it on an idle machine:
python tests/bench/bench_permute.py [PART ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsec import data, quality
from sparsec.models import load_model
from sparsec.pattern import Pattern, Strip
from sparsec.permuting.objective import grouped
from sparsec.permuting.outputs import assign_rows
from sparsec.permuting.search import matrix
from sparsec.pipeline import Context, PassManager

LAYER = "encoder.layer.2."
KEPT = {  # both sides permuted, strips with rows assigned
    ("attention.output.dense.weight", "64:2:5"): (0.6432, 0.6514),
    ("attention.output.dense.weight", "64:2:8"): (0.4373, 0.4371),
    ("attention.self.query.weight", "64:2:5"): (0.6352, 0.6460),
    ("intermediate.dense.weight", "64:2:5"): (None, 0.6571),
    ("intermediate.dense.weight", "64:2:8"): (None, 0.4449),
    ("output.dense.weight", "64:2:5"): (None, 0.6635),
    ("output.dense.weight", "64:2:8"): (None, 0.4551),
}
EFFICACY, EFFICACY_SECONDS = 0.36, 5.0
SITES_SECONDS = {"graph": 120.0, "kernel": 60.0}
SIZES = [(768, 768), (3072, 768), (768, 3072), (1024, 1024), (4096, 1024), (1024, 4096)]
SOLVERS = ("oneshot{solver=sparsegpt}", "oneshot")
MISSED: list[str] = []


P, R = ParamSpec("P"), TypeVar("R")


def timed(job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[R, float]:
    start = time.process_time()
    return job(*args, **kwargs), time.process_time() - start


def check(what: str, found: float, least: float) -> str:
    if found < least:
        MISSED.append(f"{what}: {found:.4f} < {least:.4f}")
    return f"{found:.4f} ({least:.4f})"


def kept() -> None:
    print(
        "| weight | pattern | as it is | both sides | seconds | strips | strips, rows assigned | seconds |\n"
        + "|---" * 8
        + "|"
    )
    program = load_model("demo:minilm").program
    for (name, text), (both, strips) in KEPT.items():
        site = next(site for site in program.sites if site.name.endswith(LAYER + name))
        score = site.read(program.module)[0].abs()
        pattern, strip = Pattern.parse(text), Pattern.parse(f"{text}@strip")
        assert isinstance(strip, Strip)
        permute = grouped(pattern)
        assert permute is not None
        (_, _, grid), spent = timed(matrix, score, permute)
        order, assigned = timed(assign_rows, score, strip)
        shares = [
            share(score, pattern),
            float(grid.total / score.sum()),
            share(score, strip),
            share(score[order], strip),
        ]
        cells = [
            f"{shares[0]:.4f}",
            check(f"{name} {text}, both sides", shares[1], both or 0),
            f"{spent:.1f}",
            f"{shares[2]:.4f}",
            check(f"{name} {text}, strips", shares[3], strips),
            f"{assigned:.1f}",
        ]
        print(f"| {name} | {text} | {' | '.join(cells)} |", flush=True)


def share(score: Tensor, pattern: Pattern) -> float:
    return float((score * pattern.choose(score)[1][0]).sum() / score.sum())


def sites() -> None:
    program = load_model("demo:minilm").program
    torch.set_num_threads(2)
    for text, mode in (("64:2:5", "graph"), ("2:4", "graph"), ("64:2:5", "kernel")):
        passes = PassManager.parse(f"permute{{pattern={text}, mode={mode}}}")
        start = time.perf_counter()
        (_, (report,)), used = timed(passes.run_reported, program)
        spent = time.perf_counter() - start
        shares = np.array(list(report.data["retained"].values())).mean(0)
        count = len(report.data["retained"])
        seconds = f"{spent:.0f} s, {used:.0f} of processors"
        print(f"{text} {mode}: {count} sites, {seconds}, kept {shares[0]:.4f} -> {shares[1]:.4f}", flush=True)
        if spent > SITES_SECONDS[mode]:
            MISSED.append(f"{text} {mode}: {spent:.0f} s")
    torch.set_num_threads(1)


def published() -> None:
    score, pattern = torch.from_numpy(np.random.RandomState(1).rand(128, 64)), grouped(Pattern.parse("2:4"))
    assert pattern is not None
    plain, best = share(score, pattern) * float(score.sum()), float(score.sort(1).values[:, 32:].sum())
    (_, _, grid), spent = timed(matrix, score, pattern)
    print(f"2:4 keeps {plain:.3f}, permuted {grid.total:.3f}, the best half of every row {best:.3f}")
    print(f"efficacy {check('published', (grid.total - plain) / (best - plain), EFFICACY)}, {spent:.1f} s")
    if spent > EFFICACY_SECONDS:
        MISSED.append(f"published: {spent:.1f} s")


def outputs() -> None:
    loaded = load_model("demo:minilm")
    calibration = data.calibration(loaded.program, loaded.tools, data.Request("", samples=128))
    context = Context(resources={"calibration": calibration})
    print("| pattern | passes | error | error, permuted by magnitude | by wanda |\n" + "|---" * 5 + "|")
    for text in ("64:2:5", "2:4"):
        program = loaded.program.replace(sites=loaded.program.sites.with_targets({"*": text}))
        permuted = [program] + [
            PassManager.parse(f"permute{{score={score}}}").run(program, context) for score in ("magnitude", "wanda")
        ]
        for passes in SOLVERS:
            errors = []
            for one in permuted:
                pruned = PassManager.parse(passes).run(one, context)
                errors.append(quality.measure(pruned, loaded.program, loaded.samples).relative_error)
            if errors[1] >= errors[0]:  # by magnitude, the default
                MISSED.append(f"{text} {passes}: error {errors[0]:.4f}, permuted {errors[1]:.4f}")
            print(f"| {text} | {passes} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)


def sizes() -> None:
    print("| rows x cols | pattern | as it is | both sides | seconds |\n" + "|---" * 5 + "|")
    for rows, cols in SIZES:
        score = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).abs()
        for text in ("64:2:5", "2:4"):
            pattern = grouped(Pattern.parse(text))
            assert pattern is not None
            (_, _, grid), spent = timed(matrix, score, pattern, 1)
            shares = f"{share(score, pattern):.4f} | {grid.total / score.sum():.4f}"
            print(f"| {rows} x {cols} | {text} | {shares} | {spent:.1f} |", flush=True)


PARTS = {"published": published, "kept": kept, "sites": sites, "outputs": outputs, "sizes": sizes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        print(f"\n## {part}\n")
        PARTS[part]()
    print("\n" + ("; ".join(MISSED) or "all targets met"))
    sys.exit(bool(MISSED))
