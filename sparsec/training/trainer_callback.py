"""The engine under the transformers Trainer. Its gradients are already clipped where the engine first sees them."""

from __future__ import annotations

from typing import Any

from sparsec.training.engine import Engine


def trainer_callback(engine: Engine) -> Any:
    """A TrainerCallback that drives `engine` while a Trainer trains its `GraphModel`. Call `engine.end` afterwards.

    The Trainer's hooks run: backward, clip, on_pre_optimizer_step, optimizer, on_optimizer_step. Set
    `trainer.model_accepts_loss_kwargs = False`, or accumulated losses are added up instead of averaged, and
    `remove_unused_columns=False, label_names=["labels"]`: a graph's inputs cannot be read from its signature.
    """
    from transformers import TrainerCallback

    class EngineCallback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine.begin(state.max_steps, -(-state.max_steps // max(1, round(state.num_train_epochs))))

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            engine.observe()
            engine.pre_step()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            engine.post_step(_plain(optimizer))

        def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            engine.epoch_end(_plain(optimizer))

    return EngineCallback()


def _plain(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper, whose state is keyed by the parameters."""
    return getattr(optimizer, "optimizer", optimizer)
