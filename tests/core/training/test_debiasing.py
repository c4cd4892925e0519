"""Losses against a known bias, by hand; that the bias reaches no model; what is said of a bias model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from training_models import check, context, run, task, wide

from sparsec.errors import UsageError
from sparsec.training.debiasing import ConfidenceRegularised, ProductOfExperts, Reweighted, remark
from sparsec.training.losses import LossTerm, Objective, objective

BIAS = torch.tensor([[0.75, 0.25], [0.75, 0.25]]).log()
LABELS = torch.tensor([1, 0])
SAMPLES = {"x": torch.zeros(2, 1), "labels": LABELS, "bias": BIAS}


def learnt(
    term: LossTerm, batch: dict[str, Tensor] = SAMPLES, teacher: dict[str, Tensor] | None = None
) -> tuple[float, Tensor]:
    """The loss of logits (0, ln 3), which are (1/4, 3/4), and (0, 0), and its gradient."""
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]], requires_grad=True)
    made = Objective((term,))
    loss = made.loss({"logits": logits}, batch, teacher or {}, made.counts([batch]))
    return float(loss.detach()), torch.autograd.grad(loss, logits)[0]


def test_a_product_of_experts_by_hand() -> None:
    """(1/4 3/4, 3/4 1/4) is even; (1/2 3/4, 1/2 1/4) is (3/4, 1/4). The gradient is that less the label, halved."""
    loss, gradient = learnt(ProductOfExperts())

    assert pytest.approx((math.log(2) + math.log(4 / 3)) / 2) == loss
    assert torch.allclose(torch.tensor([[0.25, -0.25], [-0.125, 0.125]]), gradient)


def test_a_reweighted_loss_by_hand() -> None:
    """The bias gives the labels 1/4 and 3/4, so they weigh 3/4 and 1/4."""
    loss, gradient = learnt(Reweighted())

    assert pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(2)) / 2) == loss
    assert torch.allclose(torch.tensor([[0.75 / 4, -0.75 / 4], [-0.25 / 2, 0.25 / 2]]) / 2, gradient)


def test_confidence_regularisation_by_hand() -> None:
    """b = 1/4: (1, 16)^(3/4) is (1, 8); b = 3/4: (81, 1)^(1/4) is (3, 1)."""
    teacher = {"logits": torch.tensor([[0.0, math.log(16.0)], [math.log(81.0), 0.0]])}
    loss, gradient = learnt(ConfidenceRegularised(), teacher=teacher)

    first = -(math.log(1 / 4) + 8 * math.log(3 / 4)) / 9
    assert pytest.approx((first + math.log(2)) / 2) == loss
    assert torch.allclose(torch.tensor([[1 / 4 - 1 / 9, 3 / 4 - 8 / 9], [-0.25, 0.25]]) / 2, gradient, atol=1e-6)


@pytest.mark.parametrize("term", [ProductOfExperts(), Reweighted(), ConfidenceRegularised()])
def test_a_label_of_minus_100_does_not_count(term: LossTerm) -> None:
    batch, teacher = SAMPLES | {"labels": torch.tensor([1, -100])}, {"logits": torch.zeros(2, 2)}
    one = {name: value[:1] for name, value in batch.items()}
    alone = Objective((term,))
    logits = torch.tensor([[0.0, math.log(3.0)]])
    expected = alone.loss({"logits": logits}, one, {"logits": torch.zeros(1, 2)}, alone.counts([one]))
    loss, gradient = learnt(term, batch, teacher)

    assert pytest.approx(float(expected)) == loss
    assert not gradient[1].any() and gradient[0].all()


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (None, "the batches have x, labels; expected 'bias' too"),
        (torch.zeros(2, 3), r"bias is float32\[2, 3\]; with logits \[2, 2\] expected"),
        (torch.ones(2, 2, dtype=torch.int64), r"bias is int64\[2, 2\]"),
        (BIAS.exp(), r"a row's probabilities add up to exp\(1.22\); expected finite log-probabilities"),
        (torch.tensor([[0.0, -math.inf]] * 2), "found -inf or NaN; expected finite log-probabilities"),
        (torch.full((2, 2), math.nan), "found -inf or NaN"),
    ],
)
def test_a_bias_of_another_kind_is_refused(bias: Tensor | None, message: str) -> None:
    batch = {name: value for name, value in SAMPLES.items() if name != "bias"} | (
        {} if bias is None else {"bias": bias}
    )
    with pytest.raises(UsageError, match=message):
        learnt(ProductOfExperts(), batch)


def test_what_is_missing_is_named() -> None:
    logits = {"logits": torch.zeros(2, 2)}
    with pytest.raises(UsageError, match=r"loss confreg: the model's output logits is \(2, 2\), the teacher's none"):
        learnt(ConfidenceRegularised())
    with pytest.raises(UsageError, match="loss poe: the batches have x, bias; expected labels too"):
        objective("poe", {"x": torch.zeros(2, 1), "bias": BIAS}, logits, 0.0, 2.0, 1.0)
    with pytest.raises(UsageError, match="train: some batches have bias and some have none"):
        run("fixed-mask{pattern=2:4, loss=poe}", ctx=context([with_bias(0.5)[0], task()[1]]))


def test_a_bias_model_that_is_perfect_or_useless_is_said_so() -> None:
    sure = torch.tensor([[0.002, 0.998], [0.998, 0.002]]).log()

    assert "the bias model is perfect: it gives the true class 0.998" in str(remark([SAMPLES | {"bias": sure}]))
    assert "useless: its loss on the labels is 0.837" in str(remark([SAMPLES]))
    assert "always giving how frequent they are 0.693" in str(
        remark([SAMPLES | {"bias": torch.full((2, 2), 0.5).log()}])
    )
    assert remark([SAMPLES | {"bias": torch.tensor([[0.4, 0.6], [0.6, 0.4]]).log()}]) is None
    assert remark([SAMPLES | {"labels": torch.tensor([-100, -100])}]) is None


def with_bias(sure: float) -> list[dict[str, Tensor]]:
    """The tiny task, with a bias model that gives the true class `sure` beside an even third."""
    found = []
    for batch in task():
        given = torch.full((len(batch["labels"]), 3), (1 - sure) / 3)
        found.append(
            batch | {"bias": given.scatter_add(1, batch["labels"][:, None], torch.tensor(sure).expand(16, 1)).log()}
        )
    return found


@pytest.mark.parametrize("loss", ["poe", "reweight", "confreg"])
def test_passes_train_with_it_and_the_model_is_not_given_the_bias(loss: str) -> None:
    options = f"{{pattern=2:4, epochs=1, lr=0.01, loss={loss}}}"
    done, report = run(f"fixed-mask{options}", ctx=context(with_bias(0.5), eval=with_bias(0.5)))
    other, _ = run(f"fixed-mask{options}", ctx=context(with_bias(0.9)))
    plain, _ = run("fixed-mask{pattern=2:4, epochs=1, lr=0.01}", ctx=context(with_bias(0.5)))

    check(done, "2:4")
    assert ["x"] == list(done.inputs) == list(wide().inputs)
    assert 1 == len(report.data["evaluation"])
    weights = [site.read(program.module) for program in (done, other, plain) for site in list(program.sites.sparse)[:1]]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not any("bias model" in note.text for note in report.notes)


def test_the_report_says_that_the_bias_model_is_useless() -> None:
    _, report = run("fixed-mask{pattern=2:4, epochs=1, loss=poe}", ctx=context(with_bias(0.0)))

    assert any("train" == note.site and "the bias model is useless" in note.text for note in report.notes)
