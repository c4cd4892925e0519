"""One of two processes that train together; started by test_distributed_training.py as `together.py PART FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import models
from training_models import METHODS, loop, task

from sparsec.errors import TrainingError
from sparsec.pipeline import Context, PassManager
from sparsec.program import Program
from sparsec.tracing import trace
from sparsec.training import distributed
from sparsec.training.checkpoints import Checkpoints, TerminatedError
from sparsec.training.distributed import Group
from sparsec.training.parts import Method
from sparsec.training.schedules import Once, Repeated
from sparsec.training.session import Session
from sparsec.training.updates import Hard, StraightThrough

STOPPED, QUICK, PROGRAM = 4, "gradual", "program"


class Plain(nn.Module):
    """Nothing random: parts of a batch give what the whole gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))))}


class Normed(nn.Module):
    """Running statistics, which every process sees other samples for."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.drop, self.head = (
            nn.Linear(12, 20), nn.BatchNorm1d(20), nn.Dropout(0.2), nn.Linear(20, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.drop(torch.relu(self.norm(self.up(x)))))}


def traced(net: type[nn.Module]) -> Program:
    return trace(models.made(net), (models.random(2, 12),))


def trained(program: Program, name: str, size: int, **resources: Any) -> Program:
    """`Plain` after a method; 84 samples, so that the last step has 20 and one of two processes 4."""
    text = f"{METHODS[name]}, pattern=2:4, lr=0.01, batch_size={size}, weight_decay=0.1}}"
    batches = [*task(80, 16), {key: value[:4] for key, value in task()[0].items()}]
    return PassManager.parse(text).run(program, Context(resources={"train": batches, **resources}))


def tensors(program: Program) -> dict[str, Tensor]:
    """Weights, statistics, and which weights were kept."""
    found = {name: value.detach() for name, value in program.module.named_parameters()}
    found |= dict(program.module.named_buffers())
    for site in program.sites.sparse:
        assert site.selection is not None
        found[f"{site.name}:positions"] = site.selection.positions
    return {name: value.clone() for name, value in found.items()}


def gradients(program: Program, **options: Any) -> dict[str, Tensor]:
    """Those of the first step, of 16 samples."""
    program = program.replace(sites=program.sites.with_targets({"*": "2:4"}))
    made = loop(Method(Once(), Hard()), program=program, batches=task(16), epochs=1, max_grad_norm=0, **options)
    made.run(1)
    return {name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None}


def stopped(group: Group, folder: Path) -> tuple[str, dict[str, Tensor]]:
    """What a training ends with of which process 1 alone was told to end, and its weights once it was resumed."""

    def session() -> Session:
        return Session(loop(Method(Repeated(2), StraightThrough(2e-4)), group=group, size=8), None, kept)

    kept = Checkpoints(folder / "stopped", seconds=1e9)
    first, said = session(), ""
    step = first.loop.engine.post_step

    def post_step(optimizer: Any) -> None:
        step(optimizer)
        if group.rank == 1 and first.loop.engine.clock.step == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)

    first.loop.engine.post_step = post_step  # type: ignore[method-assign,assignment]
    try:
        first.run()
    except TerminatedError as error:
        said = str(error)
    second = session()
    second.run()
    return said, tensors(second.loop.finish())


def quick(group: Group, plain: Program, folder: Path) -> None:
    """What runs in every test run."""
    rank, said = group.rank, dict[str, Any]()
    save_file(tensors(trained(plain, QUICK, 8)), folder / f"{QUICK}.{rank}.safetensors")
    save_file(gradients(plain, size=8, group=group), folder / f"gradients.{rank}.safetensors")
    other = {"same": torch.ones(3), "up.weight": torch.full((2, 2), float(rank))}
    try:
        group.check_same(other, "after step 7")
    except TrainingError as error:
        said["differs"] = str(error)
    given = {"a": torch.arange(6).reshape(2, 3), "b": torch.tensor(1.5, dtype=torch.bfloat16), "c": torch.zeros(0, 2)}
    shared = group.share((given, {"words": [1, "two", None]}) if rank == 0 else None)
    assert shared is not None
    said["shared"] = [shared[1], {name: [str(value.dtype), value.tolist()] for name, value in shared[0].items()}]
    said["nothing"] = group.share(None)
    distributed.leave()
    said["threads"] = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]  # none but on Linux
    (folder / f"said.{rank}.json").write_text(json.dumps(said))


def whole(group: Group, plain: Program, folder: Path) -> None:
    """The rest."""
    rank = group.rank
    for name in METHODS:
        save_file(tensors(trained(plain, name, 8)), folder / f"{name}.{rank}.safetensors")
    text = "sr-ste{pattern=2:4, every=2, lr=0.01, batch_size=8}"
    normed = PassManager.parse(text).run(traced(Normed), Context(resources={"train": task()}))
    save_file(tensors(normed), folder / f"normed.{rank}.safetensors")
    evaluated = trained(plain, "admm", 8, log=folder / f"log.{rank}.jsonl", eval=task()[:2])
    save_file(tensors(evaluated), folder / f"evaluated.{rank}.safetensors")
    said, resumed = stopped(group, folder)
    save_file(resumed, folder / f"resumed.{rank}.safetensors")
    (folder / f"stopped.{rank}.txt").write_text(said)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[2])
    plain = Program.load(place / PROGRAM)  # faster than tracing it again
    {"quick": quick, "whole": whole}[sys.argv[1]](distributed.join(), plain, place)
