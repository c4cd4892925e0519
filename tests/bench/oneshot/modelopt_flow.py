"""nvidia-modelopt, as its documentation says: `mts.sparsify(model, mode, config)`, then `mts.export`. 2:4 only."""

from __future__ import annotations

from typing import Any

import modelopt.torch.sparsity as mts
import torch
from torch import Tensor

from oneshot.job import Batch, Job
from oneshot.loading import load_model

PACKAGES = ("nvidia-modelopt",)
MODES = {"magnitude": "sparse_magnitude", "sparsegpt": "sparsegpt"}
RULES = {"nn.Linear": {"*": {}, "*lm_head*": None, "*pooler*": None}}


class Modelopt:
    def __init__(self, job: Job, given: list[Batch]) -> None:
        if job.pattern != "2:4":
            raise ValueError(f"modelopt prunes to 2:4 only, found {job.pattern}")
        self.beside: dict[str, float] = {}
        self.model: Any = load_model(job.folder)
        self.mode, self.given = MODES[job.method], given

    def forward(self, batch: Batch) -> None:
        self.model(**batch)

    def prune(self) -> None:
        config = {"forward_loop": self._forwards, "device": "cpu"} if self.mode == "sparsegpt" else None
        self.model = mts.sparsify(self.model, [(self.mode, RULES)], config)

    def _forwards(self, model: Any) -> None:
        with torch.no_grad():
            for batch in self.given:
                model(**batch)

    def tensors(self) -> dict[str, Tensor]:
        return dict(mts.export(self.model).named_parameters())


def load(job: Job, given: list[Batch]) -> Modelopt:
    return Modelopt(job, given)
