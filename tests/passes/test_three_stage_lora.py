"""The three-stage-lora pass: gradients and merges by hand, its stages, peft's adapters, exact zeros, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from lora_files import pair, saved
from models import Transposed
from torch import Tensor, nn
from training_models import Wide, check, context, engine, loop, run, wide

from sparsec import PassManager, trace
from sparsec.errors import ArtifactError, PatternError, RecipeError, UsageError
from sparsec.passes.three_stage_lora import ThreeStageLora
from sparsec.program import Program
from sparsec.training import adapters
from sparsec.training.engine import Engine
from sparsec.training.lora import MaskedLora, Relative, Stages
from sparsec.training.model import own
from sparsec.training.parts import Clock, Magnitude, Method

OPTIONS = "rank=3, stage1=0.17, stage2=0.34, every=2, adapter_lr=0.02, lr=0.01"  # masks after 2, 4 and 6 of 12 steps
FLOAT32 = 1e-6


def by_hand(stage1: float) -> tuple[Engine, nn.Parameter, dict[str, Tensor]]:
    """W 2 x 4 with A = [1 0 2 0], B = [1 -1]^T, scale 2, in ten steps."""
    stages = Stages(stage1, 0.2, 1)
    update = MaskedLora(0.1, stages, rank=1, alpha=2)
    made, parameter = engine([[4.0, 3, 2, 1], [1, 2, 3, 4]], "2:4", Method(stages, update, Magnitude(), "l1"))
    made.begin(10, 10)
    state = made.sites[0].tensors
    state["a"].copy_(torch.tensor([[[1.0, 0, 2, 0]]]))
    state["b"].copy_(torch.tensor([[[1.0], [-1]]]))
    return made, parameter, state


def test_a_merge_by_hand() -> None:
    made, parameter, state = by_hand(stage1=0.1)
    made.numbers["updates"] = 1
    made.post_step()  # the first choice of masks: 2 B A = [2 0 4 0; -2 0 -4 0]

    assert [[6, 3, 6, 1], [-1, 2, -1, 4]] == state["base"].tolist()
    assert [[6, 0, 6, 0], [0, 2, 0, 4]] == parameter.tolist()
    assert [[1, 0, 1, 0], [0, 1, 0, 1]] == state["mask"].int().tolist()
    assert {"changed": [[1, 0.5]]} == made.curves
    assert not state["b"].any()
    assert not torch.equal(torch.tensor([[[1.0, 0, 2, 0]]]), state["a"])

    state["a"].copy_(torch.tensor([[[0.0, 10, 0, 0]]]))
    state["b"].copy_(torch.tensor([[[1.0], [0]]]))
    made.numbers["updates"] = 2
    made.post_step()  # a masked weight returns
    assert [[6, 23, 0, 0], [0, 2, 0, 4]] == parameter.tolist()


@pytest.mark.parametrize("masked", [False, True])
def test_the_first_step_is_adams_on_the_hand_computed_gradient(masked: bool) -> None:
    """G = [1 2 3 4; 5 6 7 8]: dB = 2 G A^T = [14 38]^T and dA = 2 B^T G = -8 each; masked, G loses columns."""
    made, parameter, state = by_hand(stage1=0 if masked else 0.1)
    assert masked == ("mask" in state)
    parameter.grad = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    made.pre_step()

    by_b = [2.0, 28] if masked else [14.0, 38]  # mask [1 1 0 0; 0 0 1 1]
    by_a = [2.0, 4, -14, -16] if masked else [-8.0] * 4
    assert torch.allclose(torch.tensor(by_b), state["b_mean"].flatten() / 0.1, rtol=1e-5)
    assert torch.allclose(torch.tensor(by_a), state["a_mean"].flatten() / 0.1, rtol=1e-5)
    assert torch.allclose(torch.tensor([0.9, -1.1]), state["b"].flatten())  # Adam's first step is lr times the sign
    assert parameter.grad is None


def transposed() -> Program:
    """A program of its own with one Conv1D, 0."""
    program = trace(nn.Sequential(models.made(Transposed)).eval(), (models.random(5, 4),)).clone()
    own(program)
    return program.replace(sites=program.sites.with_targets({"*": "2:4"}))


def test_gradients_and_values_of_a_transposed_weight_are_those_of_autograd() -> None:
    stages = Stages(0, 0.2, 1)
    made = Engine(transposed(), Method(stages, MaskedLora(0.01, stages, rank=2, alpha=5), Relative(), "l1"))
    made.begin(10, 10)
    state, parameter = made.sites[0].tensors, made.sites[0].parameter
    state["b"].copy_(models.random(1, 6, 2, seed=8))
    a, b = (state[name].clone().requires_grad_() for name in ("a", "b"))
    gradient = models.random(4, 6, seed=9)
    (torch.where(state["mask"], state["base"] + 2.5 * (b @ a)[0].T, 0.0) * gradient).sum().backward()

    parameter.grad = gradient.clone()
    made.pre_step()
    for leaf, name in ((a, "a"), (b, "b")):
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, state[f"{name}_mean"] / 0.1, rtol=1e-4, atol=1e-5)
        assert torch.allclose(leaf.detach() - 0.01 * leaf.grad.sign(), state[name], atol=1e-5)
    whole = state["base"] + 2.5 * (state["b"] @ state["a"])[0].T
    made.numbers["updates"] = 3  # in stage 3
    made.clock = replace(made.clock, step=2)
    made.post_step()
    assert torch.allclose(torch.where(state["mask"], whole, 0.0), parameter, atol=FLOAT32)
    assert 12 == int(state["mask"].sum())


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("16:2:8", marks=pytest.mark.slow), "unstructured:0.75"])
def test_masks_are_chosen_in_stage_2_and_end_exactly_in_the_pattern(pattern: str) -> None:
    done, report = run(f"three-stage-lora{{epochs=2, {OPTIONS}}}", wide({"*": pattern}))

    check(done, pattern)
    assert [2, 4, 6] == [step for step, _ in report.data["curves"]["changed"]]
    assert all(share > 0 for _, share in report.data["curves"]["changed"])
    assert not [name for name, _ in done.module.named_parameters() if "lora" in name]


def test_a_training_goes_dense_then_masked_and_what_it_computes_with_is_kept() -> None:
    method = ThreeStageLora(rank=3, stage1=0.17, stage2=0.34, every=2, score="magnitude", adapter_lr=0.05).method()
    made = loop(method, "16:2:8")
    made.run(1)
    site = made.engine.sites[0]
    size, shape = site.parameter.numel(), site.site.shape
    assert bool((site.parameter != 0).all())
    made.run(7)
    mask = site.tensors["mask"].clone()
    made.run(11)

    assert torch.equal(mask, site.tensors["mask"])
    assert torch.equal(mask, site.parameter != 0)
    assert 5 * size + 12 * 3 * (shape[1] + shape[2]) == sum(tensor.nbytes for tensor in site.tensors.values())
    assert site.parameter not in made.optimizer.state
    before = site.parameter.detach().clone()
    with made.engine.pruned():
        assert torch.equal(before, site.parameter.detach())
    made.run()
    computed = site.parameter.detach().clone()
    assert torch.equal(computed, made.finish().module.get_parameter(site.site.name))
    assert torch.equal(mask, computed != 0)


@pytest.mark.parametrize("at", [3, 9])
def test_a_training_goes_on_bit_for_bit(at: int) -> None:
    method = ThreeStageLora(rank=2, stage1=0.17, stage2=0.34, every=2).method()
    whole, begun, resumed = (loop(method) for _ in range(3))
    whole.run()
    begun.run(at)
    tensors, plain = begun.state_dict()
    resumed.load_state({name: value.clone() for name, value in tensors.items()}, json.loads(json.dumps(plain)))
    resumed.run()

    assert whole.losses == resumed.losses
    assert whole.finish().dump(hashes=True) == resumed.finish().dump(hashes=True)


def test_relative_importance_by_hand() -> None:
    made, parameter = engine([[1.0, -3], [0, 2]], "unstructured:0.5", Method(Stages(), MaskedLora(1.0, Stages())))
    found = Relative().score(made.sites[0], parameter.detach())

    assert torch.allclose(torch.tensor([[1 + 1 / 4, 3 / 5 + 3 / 4], [0, 2 / 5 + 1]]), found)


def test_masks_are_chosen_first_and_last_and_every_so_often() -> None:
    assert (5, 10) == Stages().bounds(100)
    assert [5, 8, 10] == [step for step in range(101) if Stages(every=3).chooses(step, 100)]
    assert [0] == [step for step in range(101) if Stages(0, 0).chooses(step, 100)]
    assert 100 == Stages().frozen_from(Clock(100, 10))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (Stages(0.05, 0.05, 6), r"masks would not move in stage 2: it has 5 of 100 steps \(stage2=0.05\) .* every 6"),
        (Stages(0.5, 0.499, 5), "nothing is left for stage 3: stages 1 and 2 take 100 of 100 steps"),
    ],
)
def test_stages_that_do_not_fit_the_training_are_refused(stages: Stages, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        stages.check(Clock(100, 10))


def test_an_adapter_is_merged_and_zeros_of_a_pruned_site_stay(tmp_path: Path) -> None:
    parts = pair("up", 20, 12)
    delta = 1.5 * parts["up.lora_B"] @ parts["up.lora_A"]
    adapter = adapters.read(saved(tmp_path, parts))
    masked = PassManager.parse("mask{pattern=16:2:8} | freeze").run(wide())
    for given in (wide(), masked):
        program = given.clone()
        own(program)
        before = given.module.get_parameter("up.weight").detach().clone()
        assert ["up.weight"] == adapters.merge(program, adapter)

        found = program.module.get_parameter("up.weight").detach()
        expected = before + delta if given is not masked else torch.where(before != 0, before + delta, 0.0)
        assert torch.allclose(expected, found, atol=FLOAT32)
        assert torch.equal(before, given.module.get_parameter("up.weight").detach())

    done, _ = run(f"three-stage-lora{{epochs=1, adapter={tmp_path}, stage1=0, stage2=0}}", masked)
    check(done, "16:2:8")


def test_scales_of_rank_stabilised_and_single_modules(tmp_path: Path) -> None:
    parts = pair("up", 20, 12) | pair("down", 12, 20)
    adapter = adapters.read(saved(tmp_path, parts, use_rslora=True, alpha_pattern={"up": 4}))

    assert pytest.approx({"up": 4 / 2**0.5, "down": 3 / 2**0.5}) == {
        n: scale for n, (*_, scale) in adapter.parts.items()
    }


def test_an_adapter_of_transposed_weights_is_merged(tmp_path: Path) -> None:
    program, parts = transposed(), pair("0", 6, 4)
    before = program.module.get_parameter("0.weight").detach().clone()
    adapters.merge(program, adapters.read(saved(tmp_path, parts)))

    delta = 1.5 * parts["0.lora_B"] @ parts["0.lora_A"]
    assert torch.allclose(before + delta.T, program.module.get_parameter("0.weight").detach(), atol=FLOAT32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_an_adapter_that_peft_made_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down"], init_lora_weights=False)
    made = peft.get_peft_model(models.made(Wide), config)
    made.save_pretrained(tmp_path)
    dense = made.merge_and_unload()
    program = PassManager.parse("mask{pattern=2:4} | freeze").run(wide()).clone()
    own(program)
    zeros = {site.name: site.read(program.module) == 0 for site in program.sites.sparse}

    assert ["down.weight", "up.weight"] == adapters.merge(program, adapters.read(tmp_path))
    for name in ("up.weight", "down.weight"):
        found = program.module.get_parameter(name).detach()
        assert torch.equal(zeros[name][0], found == 0)
        assert torch.allclose(torch.where(zeros[name][0], 0.0, dense.get_parameter(name)), found, atol=FLOAT32)


@pytest.mark.parametrize(
    ("tensors", "changed", "said"),
    [
        (pair("sideways", 20, 12), {}, r"the adapter changes sideways, no layer .* the model has up\.weight"),
        (
            pair("up", 20, 12, rank=13),
            {},
            r"up\.weight has 20 outputs and 12 inputs, and the adapter's rank is 13; .* 12",
        ),
        (pair("up", 20, 10), {}, r"up\.weight has 20 outputs and 12 inputs, the adapter A \(2, 10\) and B \(20, 2\)"),
        ({"up.lora_A": torch.ones(2, 12)}, {}, r"base_model\.model\.up\.lora_B\.weight is missing or more"),
        (pair("up", 20, 12) | {"head": torch.ones(3, 12)}, {}, r"base_model\.model\.head\.weight is missing or more"),
        (pair("up", 20, 12), {"use_dora": True}, "is DoRA; only LoRA"),
        (pair("up", 20, 12), {"peft_type": "IA3"}, "is IA3; only LoRA"),
        (pair("up", 20, 12), {"init_lora_weights": "pissa_niter_4"}, "began as pissa_niter_4"),
        (pair("up", 20, 12), {"lora_alpha": None}, "lora_alpha is None; expected a number"),
        ({"up.lora_A": torch.full((2, 12), torch.nan), "up.lora_B": torch.ones(20, 2)}, {}, "up has numbers that are"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], changed: dict[str, Any], said: str
) -> None:
    folder = saved(tmp_path, tensors, **changed)
    with pytest.raises((UsageError, ArtifactError), match=said):
        adapters.merge(wide(), adapters.read(folder))


def test_a_training_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    masked = PassManager.parse("mask{pattern=2:4}").run(wide())
    with pytest.raises(RecipeError, match="every site is selected already, so three-stage-lora has no weights"):
        run("three-stage-lora{epochs=1}", masked)
    with pytest.raises(UsageError, match=r"up\.weight: rank is 16, but its matrices are 20 x 12; .* at most 12"):
        run("three-stage-lora{pattern=2:4, epochs=2, every=1}", ctx=context())
    with pytest.raises(PatternError, match=r"up\.weight: three-stage-lora is defined for .* found 2:2:5\+2:4"):
        run("three-stage-lora{pattern=2:2:5+2:4, epochs=20}")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json cannot be read"):
        run(f"three-stage-lora{{pattern=2:4, adapter={tmp_path / 'none'}}}")


@pytest.mark.parametrize(
    "options", ["rank=0", "alpha=0", "adapter_lr=0", "every=0", "stage1=-1", "stage1=1", "score=l"]
)
def test_an_option_that_makes_no_sense_is_refused(options: str) -> None:
    with pytest.raises(RecipeError, match=f"three-stage-lora: {options.partition('=')[0]}"):
        PassManager.parse(f"three-stage-lora{{{options}}}")
