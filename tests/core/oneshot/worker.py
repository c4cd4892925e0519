"""One of two processes that prune together; started by test_distributed.py as `worker.py RANK WORLD FOLDER`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from core.oneshot.test_engine import Stack, batches, pruned, traced
from models import made
from safetensors.torch import save_file

from sparsec import Program
from sparsec.errors import UsageError
from sparsec.oneshot.engine import prune
from sparsec.oneshot.journal import Journal
from sparsec.oneshot.solving import Method
from sparsec.pipeline import no_progress

METHODS = {"alps": Method("alps"), "sparsegpt": Method("sparsegpt"), "wanda": Method("none", "wanda")}


def tensors(program: Program) -> dict[str, torch.Tensor]:
    """Weights, biases and masks' positions by name."""
    found = {name: value.detach() for name, value in program.module.named_parameters()}
    for site in program.sites:
        assert site.selection is not None
        found[f"{site.name}:positions"] = site.selection.positions
    return found


def main(rank: int, world: int, folder: Path) -> None:
    importlib.import_module("torch.distributed.nn.functional")  # imported later it would keep the group, see `join`
    distributed.init_process_group("gloo", f"file://{folder / 'meet'}", rank=rank, world_size=world)
    program, data = traced(made(Stack), 20, 8), batches(20, 8, count=5)
    for name, method in METHODS.items():
        save_file(tensors(pruned(program, data, method)[0]), folder / f"{name}.{rank}.safetensors")
    clone = program.clone()
    prune(clone, list(clone.sites), data, METHODS["alps"], 0, no_progress, Journal(folder / "journal"))
    errors = []
    for method, given in (
        (METHODS["alps"], data[: 3 + rank]),
        (METHODS["alps"], data[:1]),
        (Method("none", "taylor"), data),
    ):
        try:
            pruned(program, given, method)
        except UsageError as error:
            errors.append(str(error))
    (folder / f"errors.{rank}.json").write_text(json.dumps(errors))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
