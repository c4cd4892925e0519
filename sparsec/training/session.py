"""A training from begin to end: resumed where it was left, evaluated, logged, kept on disk, stopped when asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsec.training import checkpoints
from sparsec.training.checkpoints import Checkpoints, Stop
from sparsec.training.engine import State
from sparsec.training.evaluation import Evaluator
from sparsec.training.logs import Log
from sparsec.training.loop import DivergedError, Loop

_EVALUATOR = "evaluation:"


@dataclass
class Session:
    """Runs a loop. What is None is left out; every process has the same parts."""

    loop: Loop
    evaluator: Evaluator | None = None
    checkpoints: Checkpoints | None = None
    log: str | Path | None = None
    log_every: int = 10
    name: str = "training"
    """In the log: one for each pass of a recipe."""

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one. Afterwards the loop can be finished."""
        loop = self.loop
        if self.checkpoints:
            self._resume(self.checkpoints)
        writes = self.log is not None and loop.group.rank == 0
        log = Log(self.log or "", self.name, self.log_every, loop.step) if writes else None
        with checkpoints.stopping(self.checkpoints is not None) as stop:
            loop.after_step = lambda: self._after_step(log, stop)
            try:
                loop.run()
                self._stop_if_asked(stop)
            except DivergedError as error:
                raise DivergedError(f"{error}{self._last_words()}") from None
            finally:
                if log:
                    log.close()
        if self.evaluator:
            self.evaluator.restore(loop)

    def _after_step(self, log: Log | None, stop: Stop) -> None:
        loop, evaluation = self.loop, None
        if loop.epoch_ended:
            masks = {one.site.name: one.tensors["mask"] for one in loop.engine.sites if "mask" in one.tensors}
            named = {**loop.tensors(), **{f"the mask of {name}": mask for name, mask in masks.items()}}
            loop.group.check_same(named, f"after step {loop.step}")
            if self.evaluator:
                evaluation = self.evaluator.run(loop)
        if log:
            log.step(loop, evaluation)
        if self.checkpoints:
            self._keep(self.checkpoints, stop)

    def _keep(self, kept: Checkpoints, stop: Stop) -> None:
        if self.loop.step == self.loop.steps or kept.due(self.loop.epoch_ended):
            self._save()
        self._stop_if_asked(stop)

    def _stop_if_asked(self, stop: Stop) -> None:
        number = self.loop.group.most(stop.signal)  # all stop after the same step, whoever was told to
        if number and self.checkpoints:
            self._save()
            self.loop.group.barrier()  # a launcher ends the others when the first of them ends
            checkpoints.end(number, self.checkpoints.folder, self.loop.step, self.loop.steps)

    def _save(self) -> None:
        """Write a checkpoint, unless the last is of this step."""
        kept = self.checkpoints
        if self.loop.group.rank or kept is None or kept.step == self.loop.step:
            return
        tensors, plain = self.loop.state_dict()
        if self.evaluator:
            more, evaluated = self.evaluator.state_dict()
            tensors |= {f"{_EVALUATOR}{name}": value for name, value in more.items()}
            plain["evaluation"] = evaluated
        kept.save((tensors, plain), self.loop.step)

    def _resume(self, kept: Checkpoints) -> None:
        state: State | None = kept.load() if self.loop.group.rank == 0 else None
        state = self.loop.group.share(state)
        if state is None:
            return
        tensors, plain = state
        self.loop.load_state(tensors, plain)
        if self.evaluator:
            own = {n.removeprefix(_EVALUATOR): v for n, v in tensors.items() if n.startswith(_EVALUATOR)}
            self.evaluator.load_state(own, plain.get("evaluation"))

    def _last_words(self) -> str:
        """What is left of a training that went wrong."""
        if not self.checkpoints:
            return ""
        self._save()
        self.loop.group.barrier()
        place = self.checkpoints.last()
        return f"; the last good state is kept in {place}" if place else ""
