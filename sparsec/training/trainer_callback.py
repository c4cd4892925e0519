"""The engine under the transformers Trainer. Its gradients are already clipped where the engine first sees them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sparsec.errors import UsageError
from sparsec.training import engine_files, rounds
from sparsec.training.engine import Engine


def trainer_callback(engine: Engine) -> Any:
    """A TrainerCallback that drives `engine` while a Trainer trains its `GraphModel`. Call `engine.end` afterwards.

    The Trainer's hooks run: backward, clip, on_pre_optimizer_step, optimizer, on_optimizer_step. A checkpoint also
    holds the engine's state, from which a resumed training goes on. `trainer.SparseTrainer` does all that a callback
    cannot: evaluate and save pruned weights, and set `model_accepts_loss_kwargs = False` (else accumulated losses are
    added up instead of averaged), `remove_unused_columns=False` and `label_names=["labels"]`.
    """
    rounds.refuse(engine.method)
    from transformers import TrainerCallback

    class EngineCallback(TrainerCallback):  # type: ignore[misc]
        resume_from: Path | None = None  # else the checkpoint of that step in the Trainer's own folder
        saves_pruned = False

        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
            if args.load_best_model_at_end and not self.saves_pruned:
                raise UsageError("load_best_model_at_end needs SparseTrainer: a callback cannot prune what is judged")
            if state.global_step:
                engine_files.load(engine, self.resume_from or engine_files.checkpoint(args, state))
                return
            try:
                per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
            except TypeError:  # a stream: all of it is one epoch
                per_epoch = state.max_steps
            engine.begin(state.max_steps, max(1, per_epoch))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine.observe()
            engine.pre_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            engine.post_step(plain(optimizer))

        def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            engine.epoch_end(plain(optimizer))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if args.should_save:
                engine_files.save(engine, engine_files.checkpoint(args, state))

    return EngineCallback()


def plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, whose state is keyed by the parameters."""
    return getattr(optimizer, "optimizer", optimizer)
