"""The transformers Trainer that trains a program under a pattern. `trainer_callback` is the part that steps the engine.

1. What is evaluated and saved are the weights that would be kept if training ended then.
2. A checkpoint's model file holds those; the engine's files hold the weights that are not pruned yet, to go on from.
3. `load_best_model_at_end` leaves the weights that were judged best, with the selections that they had.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx, store
from sparsec.errors import ArtifactError, UsageError
from sparsec.program import Program
from sparsec.training import distributed, engine_files
from sparsec.training.engine import Engine
from sparsec.training.losses import LABELS, Objective
from sparsec.training.model import GraphModel, own
from sparsec.training.parts import Method
from sparsec.training.trainer_callback import plain, trainer_callback

_WEIGHTS = "model.safetensors"  # the Trainer's name
_FLAT = "the graph is flat: it has no layers to compute twice, and passes read whole weights"
_REFUSED = {
    "activation_checkpointing": _FLAT,
    "gradient_checkpointing": _FLAT,
    "fsdp": _FLAT,
    "deepspeed": _FLAT,
    "torch_compile": "the engine edits the graph while it is trained",
    "fp16": "its gradients are scaled when the engine sees them; use bf16",
    "label_smoothing_factor": "the objective is the loss",
}


@functools.cache
def _sparse_trainer() -> Any:
    """The class; made when it is first asked for, as transformers is heavy."""
    from transformers import Trainer

    class SparseTrainer(Trainer):  # type: ignore[misc]
        """Trains a copy of a program by a method; all that it does not name goes to the Trainer.

        The loss is the mean over a step's batches of each batch's mean, whatever the number of processes. Raises
        UsageError for arguments that do not fit a graph.
        """

        def __init__(
            self, program: Program, method: Method, objective: Objective, args: Any, teacher: Program | None = None,
            **options: Any,
        ) -> None:  # fmt: skip
            if "compute_loss_func" in options or "model_init" in options:
                raise UsageError("SparseTrainer has its model and loss from program and objective: give neither again")
            args, program = _checked(args), program.clone()
            distributed.refuse_sharded(program.module)
            own(program)
            if teacher is not None:
                teacher = teacher.clone()
                own(teacher)
            for each in (program, teacher) if teacher else (program,):
                _fx.move(each.module, args.device)
            self.engine = Engine(program, method)
            self._driver = trainer_callback(self.engine)
            self._driver.saves_pruned = True
            super().__init__(GraphModel(program, objective, teacher), args, **options)
            self.add_callback(self._driver)
            self.model_accepts_loss_kwargs = False  # else accumulated losses are added up, not averaged

        def finish(self) -> Program:
            """The trained program, after `train`: exact zeros, no masks, on the CPU. See `Engine.end`."""
            self.model.eval()
            self.model.zero_grad()
            done = self.engine.end(plain(self.optimizer))
            _fx.move(done.module, torch.device("cpu"))
            return done

        def evaluation_loop(self, *args: Any, **options: Any) -> Any:
            """What evaluate and predict run (rule 1)."""
            with self.engine.pruned():
                return super().evaluation_loop(*args, **options)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            with self.engine.pruned():  # rule 2
                super()._save(output_dir, {name: value.contiguous() for name, value in self.model.tensors().items()})

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            self._driver.resume_from = Path(resume_from_checkpoint)
            _load(self.model, self._driver.resume_from / _WEIGHTS)

        def _load_best_model(self) -> None:
            best = Path(self.state.best_model_checkpoint)
            _load(self.model, best / _WEIGHTS)
            engine_files.load(self.engine, best)
            self.engine.freeze(plain(self.optimizer))  # rule 3: as `pruned` did it when they were judged

    return SparseTrainer


def __getattr__(name: str) -> Any:
    if name == "SparseTrainer":
        return _sparse_trainer()
    raise AttributeError(f"module {__name__} has no attribute {name}")


if TYPE_CHECKING:
    SparseTrainer: Any


def _checked(args: Any) -> Any:
    """A copy of TrainingArguments that is right for a graph."""
    for name, reason in _REFUSED.items():
        if value := getattr(args, name, None):
            raise UsageError(
                f"TrainingArguments: {name} is {value!r}, which does not work here: {reason}; leave it out"
            )
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs in one process would need copies of the graph, whose masks change; start one process "
            "for each with torchrun, or show one with CUDA_VISIBLE_DEVICES"
        )
    if args.label_names not in (None, [LABELS]):
        raise UsageError(f"TrainingArguments: label_names is {args.label_names}; the objective reads {LABELS!r} alone")
    checked = copy.copy(args)
    checked.label_names, checked.remove_unused_columns = [LABELS], False  # a graph's signature names no inputs
    return checked


@torch.no_grad()
def _load(model: GraphModel, path: Path) -> None:
    """Put a checkpoint's weights into a model. Raises ArtifactError where it is not of this model."""
    stored = store.load_tensors(path)
    for name, value in model.tensors().items():
        if name not in stored or stored[name].shape != value.shape:
            raise ArtifactError(f"{path} has no {name} of {list(value.shape)}: it is a checkpoint of another model")
        value.copy_(stored[name])
