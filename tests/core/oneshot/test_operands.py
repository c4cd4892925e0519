"""What a layer multiplies its weight with, for every kind of site."""

from __future__ import annotations

import pytest
import torch
from core.oneshot.layers import CASES, ROUTED, Weighted
from models import made, random
from torch import Tensor, nn

from sparsec import Program, _fx, trace
from sparsec.oneshot.operands import input_of, items_of, matrices
from sparsec.oneshot.stream import Stream
from sparsec.passes.mask import Mask
from sparsec.pipeline import PassManager
from sparsec.sites import Site

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # fp32 sums of at most 20 products, in another order


def operands(program: Program, site: Site, user: str) -> dict[int, Tensor]:
    """Item -> x, for one use."""
    node = _fx.find(program.module, user)
    stream = Stream(program.module, [list(program.inputs.values())])
    stream.advance(node)
    ((arguments, x),) = stream.at(node, input_of(node, site))
    return dict(matrices(node, site, arguments, x, items_of(program.module, node, site)))


def products(program: Program, site: Site, user: str) -> dict[int, Tensor]:
    weight = site.read(program.module)
    return {item: x @ weight[item].T for item, x in operands(program, site, user).items()}


@pytest.mark.parametrize("name", CASES)
def test_x_times_the_transposed_weight_is_the_layers_output(name: str) -> None:
    program = CASES[name].program()
    (site,) = program.sites
    output = CASES[name].as_rows(program(**program.inputs)["output"])
    found = products(program, site, *site.users)

    assert list(range(site.shape[0])) == list(found)
    torch.testing.assert_close(torch.stack(list(found.values())), output.detach(), **ROUNDING)


@pytest.mark.parametrize("name", ["linear", "addmm", "weight on the left", "heads by einsum", "conv1d in groups"])
def test_a_mask_between_the_weight_and_its_use_changes_nothing(name: str) -> None:
    program = CASES[name].program()
    (site,) = program.sites
    program = program.replace(sites=program.sites.with_targets({site.name: "2:4"}))
    masked = PassManager((Mask(),)).run(program)

    before, after = operands(program, site, *site.users), operands(masked, site, *site.users)
    assert list(before) == list(after)
    assert all(torch.equal(before[item], after[item]) for item in before)


def test_each_expert_sees_the_tokens_that_are_routed_to_it() -> None:
    program = ROUTED.program()
    (site,) = program.sites
    output = program(**program.inputs)["output"].detach()
    found = products(program, site, *site.users)

    assert [2, 0, 3] == [len(y) for y in found.values()]
    torch.testing.assert_close(torch.cat(list(found.values())), output, **ROUNDING)


class Attend(nn.Module):
    """torch's own attention, its q, k and v stacked in one weight; `crossed`: keys from a second input."""

    def __init__(self, crossed: bool) -> None:
        super().__init__()
        self.crossed, self.attention = crossed, nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        keys = y if self.crossed else x + 0 * y.sum()
        return self.attention(x if self.crossed else keys, keys, keys, need_weights=False)[0]


@pytest.mark.parametrize(("crossed", "parts"), [(False, [[0]]), (True, [[0], [1, 2]])])
def test_uses_of_a_stacked_weight_read_their_own_parts(crossed: bool, parts: list[list[int]]) -> None:
    program = trace(made(lambda: Attend(crossed)), (random(2, 3, 6), random(2, 3, 6, seed=1)))
    site = program.sites["attention.in_proj_weight"]
    found = {user: products(program, site, user) for user in site.users}

    assert parts == [list(each) for each in found.values()]
    assert len(parts) == len({input_of(_fx.find(program.module, user), site) for user in site.users})
    for user, each in found.items():
        node, stream = _fx.find(program.module, user), Stream(program.module, [list(program.inputs.values())])
        stream.advance(node)
        (output,) = (
            node.target(*arguments)  # type: ignore[operator]
            for arguments, _ in stream.at(node, input_of(node, site))
        )
        torch.testing.assert_close(torch.cat(list(each.values()), 1), output.detach().flatten(0, -2), **ROUNDING)


class Parts(nn.Module):
    """A stacked weight in three parts of one or two matrices, used by linear, by addmm and as the left operand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, middle, high = self.weight.split([4, 8, 4])
        bias = torch.zeros(8)
        return nn.functional.linear(x, low), torch.addmm(bias, x, middle.T), high @ x.T


def test_parts_are_found_whatever_operator_reads_them() -> None:
    program = trace(made(Parts), (random(3, 5),), dynamic={})
    (site,) = program.sites
    outputs = [value.detach() for value in program(**program.inputs).values()]
    found = [products(program, site, user) for user in site.users]

    assert (4, 4, 5) == site.shape
    assert [[0], [1, 2], [3]] == sorted(list(each) for each in found)
    by_item = {item: y for each in found for item, y in each.items()}
    torch.testing.assert_close(by_item[0], outputs[0], **ROUNDING)
    torch.testing.assert_close(torch.cat([by_item[1], by_item[2]], 1), outputs[1], **ROUNDING)
    torch.testing.assert_close(by_item[3].T, outputs[2], **ROUNDING)


def test_an_einsum_behind_many_residual_layers_is_found_at_once() -> None:
    def layer(x: Tensor, weight: Tensor) -> Tensor:
        for _ in range(40):  # 2^40 paths lead back from the end to the weight
            x = x + torch.einsum("bh,oh->bo", x, weight).tanh()
        return x

    program = trace(made(lambda: Weighted((4, 4), layer)), (random(2, 4),), dynamic={})
    (site,) = program.sites

    sources = [input_of(_fx.find(program.module, user), site) for user in site.users]
    assert 40 == len(set(sources))
    assert program.module.graph.find_nodes(op="placeholder")[0] is sources[0]
