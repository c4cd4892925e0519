"""Runs cases, each in a process of its own, and keeps what they measured."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from oneshot.environments import UnavailableError, python_of
from oneshot.evaluation import Evaluation, evaluate
from oneshot.job import Job, Run
from oneshot.materials import HELD_OUT, Materials

BATCH = 4  # samples in a forward, for all tools; llm-compressor is slower with 1, and takes more memory with 16
Size = tuple[int, int]
"""Samples, tokens in each."""


@dataclass(frozen=True)
class Case:
    """One tool's method on one model."""

    tool: str
    method: str
    model: str
    size: Size
    pattern: str = "2:4"

    def __str__(self) -> str:
        return f"{self.tool}/{self.method} {self.pattern} {self.model} {self.size[0]}x{self.size[1]}"


@dataclass
class Outcome:
    """All runs of a case, the evaluation of the first, or why there are none."""

    runs: list[Run] = field(default_factory=list)
    evaluation: Evaluation | None = None
    failure: str = ""
    unavailable: bool = False
    """The tool is not to be had here; that is no failure of it."""

    @property
    def fastest(self) -> Run:
        return min(self.runs, key=lambda run: run.seconds)

    @property
    def peak(self) -> int:
        return min(run.peak for run in self.runs)


@dataclass(frozen=True)
class Bench:
    """Where everything is: environments, materials, and sparsec's methods as pass text."""

    venvs: Path
    materials: Materials
    methods: dict[str, str]

    def run(self, cases: Sequence[Case], repeats: dict[Case, int]) -> dict[Case, Outcome]:
        """Round by round, in the order given, so that what is compared runs alternately."""
        found = {case: Outcome() for case in cases}
        pythons: dict[str, Path] = {}
        for tool in dict.fromkeys(case.tool for case in cases):
            try:
                pythons[tool] = python_of(tool, self.venvs)
            except UnavailableError as error:
                for case in (case for case in cases if case.tool == tool):
                    found[case].failure, found[case].unavailable = str(error), True
        for turn in range(max(repeats.values(), default=0)):
            for case in cases:
                if turn < repeats[case] and not found[case].failure:
                    self._once(case, pythons[case.tool], found[case])
        return found

    def _once(self, case: Case, python: Path, outcome: Outcome) -> None:
        out = self.materials.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        print(case, file=sys.stderr, flush=True)
        job = self._job(case, out)
        command = [str(python), "-m", "oneshot.worker", str(job.write())]
        done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
        if done.returncode:
            outcome.failure = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            return
        outcome.runs.append(Run.read(out))
        if outcome.evaluation is None:
            held_out = self.materials.tokens(case.model, "held-out", *HELD_OUT)
            outcome.evaluation = evaluate(Path(job.folder), out / "weights.safetensors", held_out, case.pattern)

    def _job(self, case: Case, out: Path) -> Job:
        return Job(
            tool=case.tool,
            method=case.method,
            passes=self.methods.get(case.method, ""),
            folder=str(self.materials.model(case.model)),
            pattern=case.pattern,
            tokens=str(self.materials.tokens(case.model, "calibration", *case.size)),
            batch=BATCH,
            tokenizer=str(self.materials.minilm),
            out=str(out),
        )


def _environment() -> dict[str, str]:
    """One thread, no network, no accelerator."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **one, **offline, "PYTHONPATH": str(Path(__file__).parents[1])}


def in_order(cases: Iterable[Case]) -> list[Case]:
    """Each case once; those on the same model and data together, in the order they first came."""
    unique = list(dict.fromkeys(cases))
    groups = list(dict.fromkeys((case.model, case.size) for case in unique))
    return sorted(unique, key=lambda case: groups.index((case.model, case.size)))
