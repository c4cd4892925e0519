"""One pruning run in a process of its own, by the tool's own Python: python -m oneshot.worker JOB.json."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

from oneshot.job import Batch, Flow, Job, Run
from oneshot.measuring import Memory, cpu_seconds, max_rss

FORWARDS = 3


def batches(job: Job) -> list[Batch]:
    """Token ids, (batch, length) int64, with an attention mask of ones."""
    ids = torch.tensor(json.loads(Path(job.tokens).read_text()))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(job.batch)]


def measured(flow: Flow, given: list[Batch], packages: tuple[str, ...]) -> Run:
    """Forwards first: they also bring mapped weights into memory, so that the call is not charged for reading them."""

    def once() -> None:
        with torch.no_grad():
            for batch in given:
                flow.forward(batch)

    forward = min(cpu_seconds(once) for _ in range(FORWARDS))
    memory = Memory()
    memory.start()
    seconds = cpu_seconds(flow.prune)
    memory.finish()
    return Run(
        seconds=seconds,
        forward=forward,
        peak=memory.peak,
        peak_anonymous=memory.peak_anonymous,
        max_rss=max_rss(),
        before=memory.before,
        series=[(round(at, 4), above) for at, above, _ in memory.samples],
        versions={name: version(name) for name in packages},
        beside=flow.beside,
    )


def main() -> None:
    job = Job.read(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    given = batches(job)
    tool = importlib.import_module(f"oneshot.{job.tool}_flow")
    flow: Flow = tool.load(job, given)
    run = measured(flow, given, (*tool.PACKAGES, "torch", "transformers"))
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in flow.tensors().items()}
    save_file(tensors, Path(job.out) / "weights.safetensors")
    run.write(job.out)


if __name__ == "__main__":
    main()
