"""What the tests of training share: a tiny task, a loop on it, and an engine that is stepped by hand."""

from __future__ import annotations

import functools
from typing import Any

import models
import torch
from torch import Tensor, nn

from sparsec.pipeline import Context, PassManager, PassReport
from sparsec.program import Program
from sparsec.tracing import trace
from sparsec.training.batches import resolve
from sparsec.training.engine import Engine
from sparsec.training.loop import Loop, Settings
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.model import GraphModel, own
from sparsec.training.parts import Method

METHODS = {
    "fixed-mask": "fixed-mask{epochs=2",
    "admm": "admm{epochs=2, rho=0.01, every=2",
    "sr-ste": "sr-ste{epochs=2, every=2",
    "gradual": "gradual{epochs=2, every=2",
}
PATTERNS = ["2:4", "1:4", "16:2:8", "unstructured:0.75"]
FAST = "lr=0.01, weight_decay=0.1, warmup=0.1"


class Wide(nn.Module):
    """A block with dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x + self.down(self.drop(torch.relu(self.up(x)))))}


def task(count: int = 96, size: int = 16, width: int = 12) -> list[dict[str, Tensor]]:
    """Which of three directions is largest: learnable, in batches of `size`."""
    x = models.random(count, width, seed=5)
    labels = (x @ models.random(width, 3, seed=6)).argmax(1)
    pairs = zip(x.split(size), labels.split(size), strict=True)
    return [{"x": inputs, "labels": answers} for inputs, answers in pairs]


@functools.cache
def _traced() -> Program:
    return trace(models.made(Wide), (models.random(2, 12),))


def wide(targets: dict[str, str] | None = None) -> Program:
    """The traced `Wide`: to be cloned, never written."""
    program = _traced()
    return program.replace(sites=program.sites.with_targets(targets)) if targets else program


def context(batches: Any = None, **resources: Any) -> Context:
    return Context(resources={"train": batches or task(), **resources})


def run(text: str, program: Program | None = None, ctx: Context | None = None) -> tuple[Program, PassReport]:
    """The program after pass text, and the report of its first pass."""
    done, reports = PassManager.parse(text).run_reported(program or wide(), ctx or context(), check="outputs")
    return done, reports[0]


def loop(method: Method, pattern: str = "2:4", program: Program | None = None, **options: Any) -> Loop:
    """A loop over the tiny task, on a program of its own."""
    program = (program or wide({"*": pattern})).clone()
    own(program)
    size, batches, group = options.pop("size", 16), options.pop("batches", None), options.pop("group", None)
    data = resolve(context(batches), "train", "test", program, size)
    model = GraphModel(program, options.pop("objective", Objective((CrossEntropy(),))), options.pop("teacher", None))
    settings = Settings(**{"epochs": 2, "lr": 0.01, "weight_decay": 0.1, **options})
    return Loop(model, Engine(program, method), data, settings, seed=3, group=group)


def engine(weight: list[list[float]], pattern: str, method: Method) -> tuple[Engine, nn.Parameter]:
    """An engine on one linear layer of this weight, to be stepped by hand."""
    net = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor(weight))
    program = trace(net.eval(), (models.random(2, len(weight[0])),))
    program = program.replace(sites=program.sites.with_targets({"weight": pattern})).clone()
    own(program)
    return Engine(program, method), program.module.get_parameter("weight")


def check(program: Program, pattern: str) -> None:
    """Every site follows the pattern exactly, and keeps as many weights as it allows."""
    assert {"traced", "selected", "trained", "frozen"} == program.facts
    assert [str(site.pattern) for site in program.sites.sparse].count(pattern) == len(program.sites.sparse) > 0
    for site in program.sites.sparse:
        weight = site.read(program.module)
        assert site.selection is not None and site.pattern is not None and site.mask is None
        mask = site.pattern.mask(site.selection, site.shape[2])
        assert 0 == site.pattern.violations_of(weight, site.selection).count
        assert not weight[~mask].any()
        assert bool((weight[mask] != 0).all())
    assert not any(name.endswith("_mask") for name, _ in program.module.named_buffers())
