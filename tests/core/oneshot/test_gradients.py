"""Scores from gradients, and what the loss is."""

from __future__ import annotations

import pytest
import torch
from core.oneshot.test_engine import Batches, Stack, batches, traced
from models import made, random
from torch import Tensor, nn

from sparsec import Program, trace
from sparsec.oneshot.gradients import MOST_BATCHES, _causal, gather
from sparsec.oneshot.scores import Score
from sparsec.pattern import NM
from sparsec.pipeline import no_progress

NAMES: list[Score] = ["taylor", "seven", "fisher"]
CLOSE = {"rtol": 1e-4, "atol": 1e-7}


def scores(program: Program, data: Batches, name: Score, seed: int = 0) -> dict[str, Tensor]:
    return gather(program, list(program.sites), data, name, seed, no_progress)


def one_layer() -> tuple[nn.Linear, Program]:
    net = made(lambda: nn.Linear(8, 6))
    return net, traced(net, 5, 8)


def by_hand(net: nn.Linear, data: Batches) -> list[Tensor]:
    """The gradient of half the mean square of the output, batch by batch."""
    found = []
    for batch in data:
        net.zero_grad()
        (net(batch["input"]).square().mean() / 2).backward()
        assert net.weight.grad is not None
        found.append(net.weight.grad.clone())
    return found


Case = tuple[Program, dict[str, Tensor]]
DATA = [{"input": batch["x"]} for batch in batches(5, 8, count=4)]


@pytest.mark.parametrize("name", NAMES)
def test_scores_have_the_shape_of_their_site_and_are_never_negative(name: Score) -> None:
    program, data = traced(made(Stack), 20, 8, pattern="4:2:5"), batches(20, 8)
    found = scores(program, data, name)

    assert [site.name for site in program.sites] == list(found)
    for site in program.sites:
        assert site.shape == found[site.name].shape
        assert torch.isfinite(found[site.name]).all()
        assert (found[site.name] >= 0).all() and found[site.name].any()
    assert all(parameter.grad is None for parameter in program.module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_same_for_a_seed(name: Score) -> None:
    program, data = traced(made(Stack), 20, 8), batches(20, 8)
    first, second, other = (scores(program, data, name, seed)["layers.0.weight"] for seed in (1, 1, 2))

    assert torch.equal(first, second)
    assert (name != "fisher") == torch.equal(first, other)


def test_taylor_is_the_sum_of_weight_times_gradient() -> None:
    net, program = one_layer()
    expected = sum((net.weight * gradient).abs() for gradient in by_hand(net, DATA))

    torch.testing.assert_close(scores(program, DATA, "taylor")["weight"][0], expected, **CLOSE)


def test_seven_is_its_loop_written_out() -> None:
    net, program = one_layer()
    first = second = expected = torch.zeros(6, 8)
    for step, gradient in enumerate(by_hand(net, DATA), start=1):
        first = 0.8 * first + 0.2 * gradient.abs()
        second = 0.9 * second + 0.1 * gradient**2
        steady = (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-9)
        expected = expected + (net.weight * gradient * steady).abs().detach()

    torch.testing.assert_close(scores(program, DATA, "seven")["weight"][0], expected, **CLOSE)


def test_fisher_of_groups_of_one_is_weight_squared_times_the_mean_squared_gradient() -> None:
    net = made(lambda: nn.Linear(8, 6))
    program = traced(net, 5, 8)
    sites = [site.replace(pattern=NM(1, 1)) for site in program.sites]
    generator, squares = torch.Generator().manual_seed(7), []
    for batch in DATA:
        net.zero_grad()
        output = net(batch["input"])
        ((output * torch.randn(output.shape, generator=generator)).sum() / 5**0.5).backward()
        assert net.weight.grad is not None
        squares.append(net.weight.grad.square())
    mean = torch.stack(squares).mean(0)
    damped = mean + 0.01 * mean.mean()

    found = gather(program, sites, DATA, "fisher", 7, no_progress)["weight"][0]
    torch.testing.assert_close(found, (net.weight.square() * damped).detach(), **CLOSE)


def test_a_tail_group_of_a_fisher_block_does_not_see_its_padding() -> None:
    net = made(lambda: nn.Linear(7, 6))
    data = [{"input": random(5, 7, seed=seed)} for seed in range(40)]
    found = scores(traced(net, 5, 7, pattern="2:4"), data, "fisher")["weight"]

    assert (1, 6, 7) == found.shape
    assert (found > 0).all()


def test_a_weight_that_the_output_does_not_depend_on_scores_zero() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.used(x), self.other(x)

    found = scores(traced(made(Unread), 5, 8), batches(5, 8), "taylor")

    assert found["used.weight"].any() and not found["other.weight"].any()


def test_no_more_batches_are_taken_than_needed() -> None:
    seen: list[int] = []
    program = one_layer()[1]
    gather(program, list(program.sites), DATA * 20, "taylor", 0, lambda task, done, total: seen.append(total))

    assert [MOST_BATCHES] * MOST_BATCHES == seen


# The loss -------------------------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Logits of each token: of itself and those before it, or of all."""

    def __init__(self, causal: bool, vocabulary: int = 10) -> None:
        super().__init__()
        self.words, self.out, self.causal = nn.Embedding(10, 8), nn.Linear(8, vocabulary), causal

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.words(input_ids) * attention_mask[..., None]
        return self.out(hidden.cumsum(1) if self.causal else hidden + hidden.sum(1, keepdim=True))


def words(causal: bool, ids: Tensor, mask: Tensor | None = None, vocabulary: int = 10) -> Case:
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
    return trace(made(lambda: Words(causal, vocabulary)), batch), batch


IDS = torch.tensor([[1, 2, 3, 4], [9, 7, 5, 3]])


def test_next_token_logits_are_told_from_others() -> None:
    assert _causal(*words(True, IDS))
    assert not _causal(*words(False, IDS))
    assert not _causal(*words(True, IDS, vocabulary=9))  # too few logits for the tokens


def test_padding_at_the_end_does_not_make_a_model_causal() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])

    assert not _causal(*words(False, IDS, mask))
    assert _causal(*words(True, IDS, mask))


def test_a_last_token_in_the_middle_of_the_vocabulary_does_not_make_a_model_causal() -> None:
    assert not _causal(*words(False, torch.tensor([[8, 1, 4], [1, 8, 4]])))  # 8 - 4 is 4 again


@pytest.mark.parametrize(("name", "causal"), [("llama", True), ("bert-mlm", False)])
def test_a_llama_predicts_the_next_token_and_a_bert_does_not(name: str, causal: bool) -> None:
    from zoo import ZOO

    case = ZOO[name]()
    program = trace(case.model, case.inputs, case.dynamic, case.limits)

    assert causal == _causal(program, case.inputs)
    some = [site.replace(pattern=None) for site in program.sites][:2]
    found = gather(program, some, [case.inputs], "taylor", 0, no_progress)
    assert all(value.any() and torch.isfinite(value).all() for value in found.values())
