"""The engine under the real transformers Trainer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from training_models import check, task, wide

from sparsec.errors import UsageError
from sparsec.training.engine import Engine
from sparsec.training.losses import CrossEntropy, Objective
from sparsec.training.model import GraphModel, own
from sparsec.training.parts import Method
from sparsec.training.schedules import Repeated
from sparsec.training.trainer_callback import trainer_callback
from sparsec.training.updates import Penalty, StraightThrough

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="the Trainer needs accelerate: pip install sparsec[train]"
)


@needs_accelerate
@pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.data")  # pinned memory without an accelerator
@pytest.mark.parametrize(
    "method", [Method(Repeated(), Penalty(0.01)), Method(Repeated(2), StraightThrough(2e-4))], ids=["admm", "sr-ste"]
)
def test_the_trainer_trains_the_graph_and_ends_in_the_pattern(method: Method, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    program = wide({"*": "2:4"}).clone()
    own(program)
    engine, model = Engine(program, method), GraphModel(program, Objective((CrossEntropy(),)))
    rows: list[dict[str, Any]] = [
        {name: value[i] for name, value in batch.items()} for batch in task() for i in range(len(batch["x"]))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[trainer_callback(engine)])
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    with engine.pruned():
        evaluated = trainer.predict(rows[:5]).predictions
    done = engine.end(trainer.optimizer.optimizer)

    check(done, "2:4")
    assert 12 == engine.clock.step
    fired = [step for step, _ in next(iter(engine.curves.values()))]
    assert fired == ([6, 12] if isinstance(method.update, Penalty) else [2, 4, 6, 8, 10, 12])
    with torch.no_grad():
        found = done(torch.stack([row["x"] for row in rows[:5]]))["logits"]
    assert torch.allclose(found, torch.tensor(evaluated), atol=1e-6)


@needs_accelerate
def test_the_callback_alone_cannot_keep_the_best(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    program = wide({"*": "2:4"}).clone()
    own(program)
    engine, model = (
        Engine(program, Method(Repeated(), Penalty(0.01))),
        GraphModel(program, Objective((CrossEntropy(),))),
    )
    best = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], **best)
    rows = [{"x": torch.ones(12), "labels": 0}] * 8
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[trainer_callback(engine)])

    with pytest.raises(UsageError, match="load_best_model_at_end needs SparseTrainer"):
        trainer.train()


def test_the_adapter_is_short() -> None:
    path = Path(trainer_callback.__code__.co_filename)

    assert len(path.read_text().splitlines()) <= 60
