"""What is trained: copies of the program's tensors, in the graph itself, on sites of every kind."""

from __future__ import annotations

import models
import pytest
import torch
from models import Dropouts, Tied, Transposed, made
from torch import Tensor, nn
from training_models import METHODS, check, context, run, task

from sparsec import trace
from sparsec.program import Program
from sparsec.training.model import GraphModel, own


class Experts(nn.Module):
    """Two experts (expert, in, out), both used by each sample, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(2, 12, 8)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.bmm(x[None].expand(2, -1, -1), self.weight)
        return self.head(hidden.transpose(0, 1).flatten(1))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(4, 6, 3, groups=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x.unflatten(1, (4, 3)))).flatten(1))


class Column(nn.Module):
    """GPT-2's Conv1D: (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Transposed(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x[:, :4])))


def test_a_clone_that_owns_its_tensors_leaves_the_origin_alone_and_ties_tied() -> None:
    origin = trace(made(Tied), (models.random(2, 6),))
    clone = origin.clone()
    own(clone)
    with torch.no_grad():
        clone.module.get_parameter("first.weight").zero_()

    theirs, ours = dict(origin.module.named_parameters()), dict(clone.module.named_parameters())
    assert theirs.keys() == ours.keys()
    assert theirs["first.weight"].any()
    assert not set(map(id, theirs.values())) & set(map(id, ours.values()))


def test_the_mode_of_the_module_is_the_mode_of_the_graph() -> None:
    program = trace(made(Dropouts), (models.random(2, 3, 4),)).clone()
    own(program)
    model, x = GraphModel(program), models.random(5, 3, 4)
    model.eval()
    with torch.no_grad():
        expected = made(Dropouts)(x)
        assert torch.equal(expected, model(x=x)["output"])
        assert not torch.equal(expected, model.train()(x=x)["output"])
    assert not torch.equal(made(Dropouts).norm.running_mean, program.module.get_buffer("norm.running_mean"))


@pytest.mark.parametrize("make", [Experts, Convolution, Column])
@pytest.mark.parametrize("text", [METHODS["admm"], METHODS["sr-ste"]], ids=["admm", "sr-ste"])
@pytest.mark.parametrize("pattern", ["2:4", "3:2:5@strip"])
def test_weights_of_every_layout_end_in_their_pattern(make: type[nn.Module], text: str, pattern: str) -> None:
    program = trace(made(make), (models.random(2, 12),))
    name = next(site.name for site in program.sites if not site.name.startswith("head"))  # one would be excluded
    program = program.replace(sites=program.sites.with_targets({name: pattern}))
    done, _ = run(f"{text}, lr=0.01}}", program)

    check(done, pattern)


def test_tied_weights_are_trained_once_and_stay_tied() -> None:
    program = trace(made(Tied), (models.random(2, 6),))
    batches = [{"x": models.random(8, 6, seed=i), "labels": models.random(8, 6, seed=9)} for i in range(4)]
    done, report = run(f"{METHODS['admm']}, pattern=2:4, batch_size=8, lr=0.01}}", program, context(batches))
    names = [name for name, _ in done.module.named_parameters() if name.endswith("weight")]

    assert 1 == report.data["trained"] == len(names)
    check(done, "2:4")
    net, x = made(Tied), models.random(3, 6)
    done.write_back(net)
    assert net.first.weight is net.second.weight
    with torch.no_grad():
        assert torch.equal(net(x), done(x)["output"])


def test_groups_of_zeros_and_ties_keep_exactly_n() -> None:
    def constant() -> nn.Module:
        net = nn.Sequential(nn.Linear(12, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
        with torch.no_grad():
            net[0].weight.fill_(0.5)
            net[0].weight[:, 4:8] = 0
        return net

    for text in METHODS.values():
        program = trace(made(constant), {"input": models.random(2, 12)})
        batches = [{"input": batch["x"], "labels": batch["labels"]} for batch in task()]
        done, report = run(f"{text}, pattern=1:4, lr=1e-9}}", program, context(batches))
        (site,) = done.sites.sparse
        assert site.selection is not None and site.pattern is not None
        assert 8 * 3 == int(site.pattern.mask(site.selection, 12).sum())
        assert 0 == report.data["violations"]


def test_batch_norm_statistics_of_the_origin_are_not_written() -> None:
    program: Program = trace(made(Dropouts), (models.random(2, 3, 4),))
    mean = program.module.get_buffer("norm.running_mean").clone()
    batches = [{"x": models.random(4, 3, 4, seed=i), "labels": models.random(4, 3, 4, seed=9)} for i in range(4)]
    done, _ = run("fixed-mask{pattern=2:4, batch_size=4}", program, context(batches))

    assert torch.equal(mean, program.module.get_buffer("norm.running_mean"))
    assert not torch.equal(mean, done.module.get_buffer("norm.running_mean"))
