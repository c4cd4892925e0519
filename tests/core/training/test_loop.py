"""The plain loop and the engine on a tiny task: exact zeros, exact gradients, exact resumption."""

from __future__ import annotations

import copy
import json
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from training_models import loop, task, wide

from sparsec.errors import TrainingError, UsageError
from sparsec.training.loop import Loop, Settings
from sparsec.training.losses import CrossEntropy, Distillation, Objective
from sparsec.training.parts import Method
from sparsec.training.schedules import Cubic, Once, Repeated
from sparsec.training.updates import Hard, Penalty, StraightThrough

METHODS = {
    "fixed-mask": Method(Once(), Hard()),
    "admm": Method(Repeated(2, 1), Penalty(0.01, "balanced")),
    "sr-ste": Method(Repeated(2), StraightThrough(2e-4)),
    "gradual": Method(Cubic(0.0, 0.6, 2), Hard()),
}
ACCUMULATED = 1e-6  # sums of 16 float32 products in another order
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def weights(made: Loop) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in made.engine.program.module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# Zeros ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_zeros_stay_exact_though_adam_has_moments_and_decays(decay: float) -> None:
    made = loop(METHODS["admm"], epochs=3, weight_decay=decay)
    made.run(made.per_epoch * 2 - 1)
    first = made.engine.sites[0]
    assert first.selection is None
    assert bool((made.optimizer.state[first.parameter]["exp_avg"] != 0).all())  # moments everywhere before the freeze
    made.run(made.per_epoch * 2 + 3)

    for site in made.engine.sites:
        mask, state = site.tensors["mask"], made.optimizer.state[site.parameter]
        assert {"mask"} == site.tensors.keys()
        for tensor in (site.parameter, state["exp_avg"], state["exp_avg_sq"]):
            assert not tensor[~mask].any()
            assert tensor[mask].any()


def test_zeros_would_not_stay_without_the_engine() -> None:
    """The fault that the test above would find: Adam's moments bring masked weights back."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(4)
    optimizer.step()
    with torch.no_grad():
        weight[2:] = 0
    weight.grad = torch.tensor([1.0, 1.0, 0.0, 0.0])
    optimizer.step()

    assert bool((weight[2:] != 0).all())


@every_method
def test_what_is_evaluated_on_the_way_is_what_would_be_kept(method: Method) -> None:
    """Inside `pruned` the graph gives what `end` would leave, and afterwards training is as before."""
    made, other = loop(method), loop(method)
    made.run(5)
    other.run(5)
    x, before = models.random(7, 12, seed=8), weights(made)
    with made.engine.pruned(), torch.no_grad():
        evaluated, kept = made.model(x=x)["logits"], weights(made)
    assert same(before, weights(made))
    made.run()
    other_end = loop(method)
    other_end.run(5)
    final = other_end.finish()
    other.run()

    assert same(kept, dict(final.module.named_parameters()))
    with torch.no_grad():
        assert torch.equal(final(x)["logits"], evaluated)
    assert same(weights(other), weights(made))


# Gradients ------------------------------------------------------------------------------------------------------------


def gradients(**options: Any) -> dict[str, Tensor]:
    """What the optimizer sees in the first step; dropout is off, because halves draw other numbers."""
    made = loop(METHODS["fixed-mask"], batches=task(16, 16), epochs=1, max_grad_norm=options.pop("clip", 0), **options)
    made.model.train = lambda mode=True: made.model  # type: ignore[method-assign]
    made.run(1)
    return {name: value.grad.clone() for name, value in made.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize(("size", "accumulate"), [(8, 2), (5, 4), (1, 16)])
@pytest.mark.parametrize("distilled", [False, True])
def test_a_step_has_the_gradient_of_its_samples_however_they_are_cut(
    size: int, accumulate: int, distilled: bool
) -> None:
    terms: Any = (CrossEntropy(), Distillation(0.5)) if distilled else (CrossEntropy(),)
    options = {"objective": Objective(terms), "teacher": wide().clone()}
    whole, parts = gradients(**options), gradients(size=size, accumulate=accumulate, **options)

    assert whole.keys() == parts.keys() and len(whole) == 6
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], rtol=0, atol=ACCUMULATED * float(value.abs().max()) * 4)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1e-6}, {"accumulate": 4, "size": 4, "max_grad_norm": 1e-6}])
def test_the_pull_of_admm_is_scaled_by_neither_clipping_nor_accumulation(options: dict[str, Any]) -> None:
    made = loop(Method(Repeated(1), Penalty(0.5)), batches=task(16, 16), epochs=2, **options)
    (up, down), seen = made.engine.sites, {}
    pull = {one.site.name: 0.5 * (one.parameter - one.tensors["pull"]).detach() for one in (up, down)}
    plain = made.engine.pre_step

    def pre_step() -> None:
        plain()
        seen.update({one.site.name: one.parameter.grad.clone() for one in (up, down) if one.parameter.grad is not None})

    made.engine.pre_step = pre_step  # type: ignore[method-assign]
    made.run(1)

    for name, value in pull.items():
        assert torch.allclose(value, seen[name], rtol=0, atol=2e-6)  # what is left of the loss is 1e-6 long
        assert float(value.abs().max()) > 1e-3


# State ----------------------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("at", [3, 8])
def test_a_loop_that_goes_on_from_its_state_ends_with_the_same_bits(method: Method, at: int) -> None:
    whole, begun, resumed = loop(method), loop(method), loop(method)
    whole.run()
    begun.run(at)
    tensors, plain = begun.state_dict()
    stored, text = save({name: value.contiguous() for name, value in tensors.items()}), json.dumps(plain)
    resumed.load_state(load(stored), json.loads(text))
    assert at == resumed.step
    resumed.run()

    assert same(weights(whole), weights(resumed))
    assert whole.losses == resumed.losses
    assert whole.engine.curves == resumed.engine.curves
    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_a_state_of_another_training_is_refused() -> None:
    made = loop(METHODS["admm"])
    made.run(2)
    state = made.state_dict()

    for other, message in [
        (loop(METHODS["sr-ste"]), "the state to resume has method .*Penalty"),
        (loop(METHODS["admm"], "1:4"), "has patterns .*2:4.*1:4"),
        (loop(METHODS["admm"], lr=0.5), "has settings"),
        (loop(METHODS["admm"], batches=task(32)), "has data"),
    ]:
        with pytest.raises(UsageError, match=message):
            other.load_state(*state)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone() -> None:
    one, other = loop(METHODS["sr-ste"]), loop(METHODS["sr-ste"])
    torch.manual_seed(1)
    one.run()
    drawn = torch.rand(1)
    torch.manual_seed(1)

    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    other.run()
    assert same(weights(one), weights(other))


@pytest.mark.parametrize(("name", "expected"), [("fixed-mask", 1), ("admm", 5), ("sr-ste", 1), ("gradual", 1)])
def test_a_method_keeps_as_many_bytes_a_weight_as_it_says(name: str, expected: int) -> None:
    made = loop(METHODS[name])
    made.run(4)
    site = made.engine.sites[0]

    assert expected * site.parameter.numel() == sum(tensor.nbytes for tensor in site.tensors.values())


def test_progress_is_told_of_every_step_its_loss_and_the_end() -> None:
    made, told = loop(METHODS["fixed-mask"]), list[tuple[str, int, int]]()
    made.progress = lambda task, done, total: told.append((task, done, total))
    made.run()

    losses = ["", *(f" loss {loss:.3g}" for loss in made.losses)]
    assert [(f"training{losses[step]}", step, 12) for step in range(13)] == told


# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_and_names_the_step() -> None:
    batches = task(48)
    batches[1]["x"][3, 2] = float("nan")
    made = loop(METHODS["admm"], batches=batches, epochs=3)

    with pytest.raises(TrainingError, match=r"the loss is nan at step [123] of 9; training stopped"):
        made.run()
    assert all(bool(value.isfinite().all()) for value in weights(made).values())
    assert not made.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected a number above 0"),
        ({"lr": float("nan")}, "lr is nan; expected a number above 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"warmup": 1.0}, "warmup is 1; expected a share of the steps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm is -1; expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**options)


def test_the_rate_rises_then_falls_to_zero_after_the_last_step() -> None:
    settings = Settings(lr=1.0, warmup=0.2)

    found = [settings.rate(step, 10) for step in range(11)]
    assert [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0] == found[:3]
    assert [pytest.approx(i / 8) for i in (2, 1, 0)] == found[8:]


def test_the_state_is_a_copy_of_nothing_and_can_be_kept() -> None:
    """Tensors of a state are those of the loop: a caller that trains on must copy or write them first."""
    made = loop(METHODS["fixed-mask"])
    made.run(1)
    tensors, _ = made.state_dict()
    kept = copy.deepcopy(tensors)
    made.run(2)

    assert any(not torch.equal(kept[name], value) for name, value in made.state_dict()[0].items())
