"""SparseTrainer: the real transformers Trainer on a tiny BERT."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from models import Tied
from safetensors.torch import load_file
from torch import Tensor
from training_models import check

from sparsec.errors import ArtifactError, UsageError
from sparsec.tracing import trace
from sparsec.training import engine_files
from sparsec.training.losses import CrossEntropy, MeanSquare, Objective
from sparsec.training.parts import Method
from sparsec.training.schedules import Repeated
from sparsec.training.updates import Penalty

if importlib.util.find_spec("accelerate") is None:
    pytest.skip("the Trainer needs accelerate: pip install sparsec[train]", allow_module_level=True)

import trainer_models
from trainer_models import METHODS, PATTERNS, classifier, gradients, rows, trainer

SAME = 1e-6  # sums of 16 float32 products in another order
slow = pytest.mark.slow
one_method = pytest.mark.parametrize("method", ["admm", *(pytest.param(m, marks=slow) for m in METHODS if m != "admm")])


def weights(made: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Training -------------------------------------------------------------------------------------------------------------


@one_method
def test_a_method_ends_in_the_pattern_with_exact_zeros_and_a_trained_head(method: str, tmp_path: Path) -> None:
    made, before = trainer(tmp_path, method, PATTERNS[method]), dict(classifier().module.named_parameters())
    untouched = {name: value.detach().clone() for name, value in before.items()}
    made.train()
    moments = made.optimizer.optimizer.state
    for one in made.engine.sites:  # weight decay is 0.1
        for value in (one.parameter, moments[one.parameter]["exp_avg"], moments[one.parameter]["exp_avg_sq"]):
            assert not value[~one.tensors["mask"]].any()
    evaluated = made.predict(rows(5)).predictions
    done, net = made.finish(), trainer_models.model()

    check(done, PATTERNS[method])
    assert all(torch.equal(untouched[name], value) for name, value in before.items())
    after = dict(done.module.named_parameters())
    assert not torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert all((value.signbit() <= (value != 0)).all() for one in done.sites.sparse for value in (after[one.name],))
    keys = list(net.state_dict())
    done.write_back(net)
    assert keys == list(net.state_dict())
    batch = {name: torch.stack([row[name] for row in rows(5)]) for name in trainer_models.INPUTS}
    with torch.no_grad():
        assert torch.equal(torch.tensor(evaluated), net(**batch).logits)


@slow
def test_tied_weights_and_groups_of_ties_are_trained_saved_and_gone_on_with(tmp_path: Path) -> None:
    net = models.made(Tied)
    with torch.no_grad():
        net.first.weight.fill_(0.5)
        net.first.weight[:, :4] = 0
    program = trace(net, (models.random(2, 6),))
    data = [{"x": models.random(6, seed=i), "labels": models.random(6, seed=9)} for i in range(32)]
    name = next(iter(program.inputs))
    data = [{name: row["x"], "labels": row["labels"]} for row in data]

    def tied(folder: Path) -> Any:
        chosen = program.replace(sites=program.sites.with_targets({"*": "2:4"}))
        args = trainer_models.arguments(folder, save_strategy="epoch", per_device_train_batch_size=8)
        objective = Objective((MeanSquare(),))
        return trainer_models.SparseTrainer(chosen, METHODS["admm"], objective, args, train_dataset=data)

    whole, resumed = tied(tmp_path), tied(tmp_path / "other")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert 1 == len(whole.engine.sites) == len([name for name in weights(whole) if name.endswith("weight")])
    assert same(weights(whole), weights(resumed))
    done = whole.finish()
    done.write_back(net)
    assert net.first.weight is net.second.weight
    (site,) = done.sites.sparse
    assert site.selection is not None and site.pattern is not None
    assert 6 * 4 == int(site.pattern.mask(site.selection, 6).sum())  # of 4 two, of the tail's 2 both


# Gradients ------------------------------------------------------------------------------------------------------------


def first(tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    made = trainer(tmp_path, "fixed-mask", program=classifier(0.0), max_steps=1, max_grad_norm=0, **options)
    found = gradients(made)
    made.train()
    return found


def test_the_gradient_is_that_of_the_samples_however_they_are_accumulated(tmp_path: Path) -> None:
    whole = first(tmp_path)
    halves = first(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=2)

    assert whole.keys() == halves.keys()
    for name, value in whole.items():
        assert torch.allclose(value, halves[name], rtol=0, atol=SAME)
    assert max(float(value.abs().max()) for value in whole.values()) > 0.01


def test_the_pull_of_admm_is_scaled_by_neither_clipping_nor_accumulation(tmp_path: Path) -> None:
    options = {"max_grad_norm": 1e-6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    made = trainer(tmp_path, Method(Repeated(1), Penalty(0.5)), program=classifier(0.0), **options)
    found, pulls = gradients(made), dict[str, Tensor]()
    begin = made.engine.begin

    def begun(steps: int, per_epoch: int) -> None:
        begin(steps, per_epoch)
        pulls.update({o.site.name: 0.5 * (o.parameter - o.tensors["pull"]).detach() for o in made.engine.sites})

    made.engine.begin = begun
    made.train()

    for name, value in pulls.items():
        assert torch.allclose(value, found[f"graph.{name}"], rtol=0, atol=2e-6)  # what is left of the loss is 1e-6 long
        assert float(value.abs().max()) > 1e-3


# What is evaluated, saved and gone on with ----------------------------------------------------------------------------


class Judge:
    """Metrics that are given beforehand; it keeps the weights that it was shown."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.seen, self.made = list(scores), list[dict[str, Tensor]](), None

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.seen.append(weights(self.made))
        return {"score": self.scores[len(self.seen) - 1]}


def judged(folder: Path, method: str, *scores: float, **options: Any) -> tuple[Any, Judge]:
    judge = Judge(*scores)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}
    made = trainer(folder, method, PATTERNS[method], compute_metrics=judge, **{**steps, **best, **options})
    judge.made = made
    return made, judge


@one_method
def test_what_is_judged_best_is_pruned_saved_and_left_in_the_end(method: str, tmp_path: Path) -> None:
    made, judge = judged(tmp_path, method, 0.1, 0.9, 0.2, 0.3)
    made.train()

    assert str(tmp_path / "checkpoint-6") == made.state.best_model_checkpoint
    best, stored = judge.seen[1], load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for one in made.engine.sites:
        shown = one.site.view.to_matrices(best[f"graph.{one.site.name}"])
        assert one.site.pattern is not None
        assert 0 == one.site.pattern.violations(shown).count
        assert int((shown != 0).sum()) == int(one.tensors["mask"].sum())
    assert same(best, {name: stored[name] for name in best})
    assert not any(value.dtype == torch.bool for value in stored.values())
    assert same(best, weights(made))
    assert not same(best, judge.seen[-1])
    done = made.finish()
    check(done, PATTERNS[method])
    assert same(
        {name.removeprefix("graph."): value for name, value in best.items()}, dict(done.module.named_parameters())
    )


@slow
def test_evaluation_and_saving_change_no_bit_of_the_training(tmp_path: Path) -> None:
    """Pruning for it, that is: evaluation itself draws random numbers from the Trainer's generator."""
    made, judge = judged(tmp_path, "sr-ste", 0.1, 0.9, 0.2, 0.3, load_best_model_at_end=False)
    made.train()
    other, dense = judged(tmp_path / "other", "sr-ste", 0.1, 0.9, 0.2, 0.3, load_best_model_at_end=False)
    other.engine.pruned = contextlib.nullcontext
    other.train()

    assert same(weights(made), weights(other))
    assert not same(judge.seen[0], dense.seen[0])


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("admm", 5),
        *(
            pytest.param(*case, marks=slow)
            for case in [("sr-ste", 6), ("gradual", 3), ("gradual", 9), ("fixed-mask", 5)]
        ),
    ],
)
def test_a_training_that_is_gone_on_with_ends_with_the_same_bits(method: str, at: int, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": at, "logging_steps": 1}
    whole, resumed = (trainer(tmp_path / name, method, PATTERNS[method], **saving) for name in ("one", "other"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / f"checkpoint-{at}"))

    losses = [[log["loss"] for log in made.state.log_history if "loss" in log] for made in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    assert same(weights(whole), weights(resumed))
    assert whole.engine.curves == resumed.engine.curves
    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_a_checkpoint_without_a_sound_state_of_the_engine_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, "admm", max_steps=3, save_strategy="steps", save_steps=3)
    made.train()
    folder = tmp_path / "checkpoint-3"
    other = trainer(tmp_path / "other", "sr-ste")
    with pytest.raises(UsageError, match=r"the state to resume has method .*Penalty"):
        other.train(resume_from_checkpoint=str(folder))

    tensors = folder / engine_files.TENSORS
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ArtifactError, match="checkpoint-3 is damaged: the engine's state was changed"):
        trainer(tmp_path / "other", "admm").train(resume_from_checkpoint=str(folder))
    (folder / engine_files.PLAIN).unlink()
    with pytest.raises(ArtifactError, match=r"sparsec_engine.json cannot be read"):
        trainer(tmp_path / "other", "admm").train(resume_from_checkpoint=str(folder))


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_checkpointing": True}, "checkpointing is True, which does not work here: the graph is flat"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, .*: the objective is the loss"),
        ({"label_names": ["start"]}, r"label_names is \['start'\]; the objective reads 'labels' alone"),
    ],
)
def test_arguments_that_do_not_fit_a_graph_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, "admm", **options)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "torch_compile", "fp16"])
def test_arguments_that_need_other_machines_are_refused_too(name: str, tmp_path: Path) -> None:
    args = trainer_models.arguments(tmp_path)
    setattr(args, name, "full_shard")
    with pytest.raises(UsageError, match=f"TrainingArguments: {name} is 'full_shard', which does not work here"):
        trainer_models.SparseTrainer(classifier(), METHODS["admm"], Objective((CrossEntropy(),)), args)


def test_the_loss_is_given_once(tmp_path: Path) -> None:
    args = trainer_models.arguments(tmp_path)
    with pytest.raises(UsageError, match="SparseTrainer has its model and loss from program and objective"):
        trainer_models.SparseTrainer(
            classifier(), METHODS["admm"], Objective((CrossEntropy(),)), args, compute_loss_func=print
        )


# Processes ------------------------------------------------------------------------------------------------------------


def processes(folder: Path, count: int, batch: int) -> list[dict[str, Tensor]]:
    """What each of several processes left, of trainings by every method."""
    script = Path(trainer_models.__file__)
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(script)]
    ended = subprocess.run([*command, str(folder), str(batch)], capture_output=True, text=True, timeout=480)
    assert 0 == ended.returncode, ended.stderr[-3000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(count)]


@slow
def test_two_processes_end_equal_and_as_one_does_with_twice_the_batch(tmp_path: Path) -> None:
    (alone,) = processes(tmp_path / "one", 1, 16)
    one, other = processes(tmp_path / "two", 2, 8)

    assert alone.keys() == one.keys() == other.keys()
    assert {name.split()[0] for name in alone} == METHODS.keys()
    for name, value in alone.items():
        assert torch.equal(one[name], other[name]), name
        if value.dtype == torch.bool:
            assert torch.equal(value, one[name]), name
        else:
            tolerance = SAME if " gradient " in name else 1e-3  # Adam divides by moments that may be tiny
            assert torch.allclose(value, one[name], rtol=0, atol=tolerance), name
