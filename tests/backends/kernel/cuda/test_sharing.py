"""Layers of one module that read the same lay it out once, and leave nothing behind. The CPU stands in for the GPU."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import random
from torch import Tensor, nn

from sparsec.attached import Attached
from sparsec.backends.kernel.cuda import sharing

MANY, FEW = 40, 8  # tokens that are laid out, and that are not


class Reader(nn.Module):
    """What a layer on panels does before it multiplies: here its result is what it would read."""

    def forward(self, x: Tensor) -> Tensor:
        return sharing.laid_out(x)


class Attention(nn.Module):
    """Three layers read x; `between` happens to it after the first. A fourth reads something else."""

    def __init__(self, between: Callable[[Tensor], object] = lambda x: None) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Reader() for _ in range(4))
        self.between = between

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        q = self.q(x)
        self.between(x)
        return q, self.k(x), self.v(x), self.o(x * 2)


@pytest.fixture(autouse=True)
def copied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Tensor]]]:
    """All copies that were made; none is left at the end."""
    made: list[weakref.ref[Tensor]] = []
    lay = sharing.side_by_side

    def counted(x: Tensor) -> Tensor:
        laid = lay(x)
        made.extend([weakref.ref(laid)] if laid.data_ptr() != x.data_ptr() else [])
        return laid

    monkeypatch.setattr(sharing, "side_by_side", counted)
    yield made
    assert all(one() is None for one in made)


def sharing_net(between: Callable[[Tensor], object] = lambda x: None) -> Attention:
    net = Attention(between).eval()
    sharing.share(net)
    return net


def test_three_layers_share_one_copy_that_goes_when_the_module_has_run(copied) -> None:
    net, x = sharing_net(), random(2, MANY // 2, 24).bfloat16()
    with torch.no_grad():
        q, k, v, o = net(x)

    assert 2 == len(copied)
    assert q is k is v and torch.equal(x, q) and torch.equal(2 * x, o)
    assert 1 == q.stride(1) and 0 == q.stride(2) % 8
    del q, k, v, o
    assert [None, None] == [one() for one in copied]  # though x is here still


def test_few_tokens_and_what_lies_so_already_are_read_as_they_are(copied) -> None:
    for x in (random(FEW, 24), random(24, MANY).T):
        with torch.no_grad():
            found = sharing_net()(x)[:3]
        assert {x.data_ptr()} == {one.data_ptr() for one in found}
    assert 0 == len(copied)


def test_what_was_written_to_is_laid_out_again(copied) -> None:
    net, x = sharing_net(lambda x: x.add_(1)), random(MANY, 24)
    before = x.clone()
    with torch.no_grad():
        q, k, v, _ = net(x)

    assert 3 == len(copied)
    assert torch.equal(x, k) and k is v
    assert torch.equal(before, q)


def test_inference_tensors_are_not_shared(copied) -> None:
    with torch.inference_mode():
        x = random(MANY, 24) * 1
        q, k, *_ = sharing_net(lambda x: x.add_(1))(x)

    assert not copied and q is k is x


def test_outside_the_module_and_in_another_thread_nothing_is_shared(copied) -> None:
    x, found = random(MANY, 24), []
    assert x is sharing.laid_out(x)
    with ThreadPoolExecutor(1) as other:
        sharing_net(lambda x: found.append(other.submit(sharing.laid_out, x).result()))(x)

    assert x is found[0]
    assert 2 == len(copied)


def test_a_module_that_fails_leaves_nothing_behind(copied) -> None:
    def fails(_: Tensor) -> None:
        raise ValueError("in the middle")

    x = random(MANY, 24)
    with pytest.raises(ValueError, match="in the middle"):
        sharing_net(fails)(x)

    assert x is sharing.laid_out(x)
    assert [None] == [one() for one in copied]


def test_a_module_inside_ends_the_sharing_and_results_stay_right(copied) -> None:
    inner, x = sharing_net(), random(MANY, 24)
    with torch.no_grad():
        q, k, v, _ = sharing_net(lambda x: inner(x) and None)(x)

    assert torch.equal(x, q) and k is v is x
    assert 3 == len(copied)


def test_compiled_code_shares_nothing_and_is_one_graph(copied) -> None:
    net, x = sharing_net(), random(MANY, 24)
    with torch.no_grad():
        found = torch.compile(net, backend="eager", fullgraph=True)(x)

    assert all(map(torch.equal, (x, x, x, 2 * x), found))
    assert not copied


def test_hooks_are_on_modules_with_several_layers_and_go_when_undone() -> None:
    model = nn.Module()
    model.one, model.two = nn.Module(), Attention()
    model.one.layer = Reader()
    attached = Attached("x", layers=("one.layer.weight", "two.q.weight", "two.k.weight"))
    attached.share(model, sharing.share)
    copied_model, copied_attached = copy.deepcopy((model, attached))

    def hooks(module: nn.Module) -> list[int]:
        return [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in (module.one, module.two)]

    assert [0, 2] == hooks(model) == hooks(copied_model)
    attached.undo()
    assert [0, 0] == hooks(model)
    assert [0, 2] == hooks(copied_model)
    copied_attached.undo()
    assert [0, 0] == hooks(copied_model)


def test_threads_of_their_own_run_at_once() -> None:
    net, gate = sharing_net(lambda x: gate.wait(10)), threading.Barrier(2)
    inputs = [random(MANY, 24, seed=seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(net, inputs))

    for x, (q, k, v, _) in zip(inputs, found, strict=True):
        assert torch.equal(x, q) and q is k is v
    del found
