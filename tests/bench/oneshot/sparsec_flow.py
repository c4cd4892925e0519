"""sparsec through its Python API: trace, give the sites their pattern, run the passes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oneshot.job import Batch, Job
from sparsec.models import load_model
from sparsec.pipeline import Context, PassManager
from sparsec.program import Program

PACKAGES = ("sparsec",)


class Sparsec:
    def __init__(self, job: Job, given: list[Batch]) -> None:
        start = time.process_time()
        program = load_model(job.folder).program
        self.beside = {"load and trace": time.process_time() - start}
        self.program: Program = program.replace(sites=program.sites.with_targets({"*": job.pattern}, ()))
        self.given = [self._inputs(batch) for batch in given]
        self.manager = PassManager.parse(job.passes)  # imports the passes
        # As `compile` does: pruned weights go to files at once and are mapped from there.
        self._work = tempfile.TemporaryDirectory()
        resources = {"calibration": self._calibration}
        self.context = Context(seed=0, resources=resources, workdir=Path(self._work.name))

    def _inputs(self, batch: Batch) -> Batch:
        zeros = torch.zeros_like(batch["input_ids"])
        return {name: batch.get(name, zeros) for name in self.program.inputs}

    def _calibration(self) -> Any:
        from sparsec.data import Calibration

        samples = sum(len(batch["input_ids"]) for batch in self.given)
        return Calibration(batches=tuple(self.given), words="the bench's tokens", sha256="", samples=samples)

    def forward(self, batch: Batch) -> None:
        self.program(**self._inputs(batch))

    def prune(self) -> None:
        self.program = self.manager.run(self.program, self.context)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = dict(self.program.module.named_parameters())
        for site in self.program.sites:
            if site.selection is not None and site.selection.columns is not None:
                found[f"{site.name}:columns"] = site.selection.columns
        return found


def load(job: Job, given: list[Batch]) -> Sparsec:
    return Sparsec(job, given)
