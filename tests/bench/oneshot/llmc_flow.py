"""llm-compressor, as its documentation says: `oneshot(model, dataset, recipe)`; the default pipeline is sequential."""

from __future__ import annotations

from typing import Any

from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from oneshot.job import Batch, Job
from oneshot.loading import load_model

PACKAGES = ("llmcompressor", "compressed-tensors")
MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


class Llmc:
    def __init__(self, job: Job, given: list[Batch]) -> None:
        self.beside: dict[str, float] = {}
        self.model: Any = load_model(job.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
        kept, of = map(int, job.pattern.split(":"))
        self.recipe = MODIFIERS[job.method](
            sparsity=1 - kept / of,
            mask_structure=f"{of - kept}:{of}",  # N is the number pruned here
            targets=["Linear"],
            ignore=["re:.*lm_head", "re:.*pooler.*"],
        )
        self.data = DataLoader(given, batch_size=None)  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> None:
        self.model(**batch)

    def prune(self) -> None:
        oneshot(model=self.model, tokenizer=self.tokenizer, dataset=self.data, recipe=self.recipe)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


def load(job: Job, given: list[Batch]) -> Llmc:
    return Llmc(job, given)
