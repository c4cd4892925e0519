"""Nets that are hard for the channel axes are permuted, proven, and keep exactly what the search says they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from core.axes_models import (
    Apply,
    Attention,
    Constant,
    Convolution,
    Experts,
    Feed,
    Flatten,
    Heads,
    Net,
    Norm,
    Square,
    Step,
    TiedEmbedding,
    Twice,
    TwoDims,
    Walk,
    steps,
)
from hypothesis import given, settings
from models import made, random
from torch import nn

from sparsec import Context, PassManager, Program, trace
from sparsec.permuting.proof import AGREES
from sparsec.pipeline import PassReport

SUMS = 1e-5  # float32 sums of up to 100 weights against float64
HOSTILE: dict[str, Callable[[], nn.Module]] = {
    "fused attention": lambda: Net(Attention(fused="chunk", served=3)),
    "attention by view": lambda: Net(Attention(fused="view", sdpa=False)),
    "rotary": lambda: Net(Attention(rope=True)),
    "gated": lambda: Net(Feed(gated=True)),
    "group norm": lambda: Net(Norm(2), Feed()),
    "grouped convolution": lambda: Net(Convolution(2), Feed()),
    "depthwise convolution": lambda: Net(Convolution(8)),
    "constant": lambda: Net(Feed(), Constant()),
    "called twice": lambda: Net(Twice(Feed())),
    "one weight on both sides": lambda: Net(Square()),
    "norm of two axes": lambda: Net(TwoDims(), Feed()),
    "flattened": lambda: Net(Flatten()),
    "softmax inside heads": lambda: Net(Heads()),
    "softmax across heads": lambda: Net(Heads(across=True)),
    "experts": lambda: Net(Experts()),
    "slices": lambda: Net(Apply(lambda x: torch.cat([x[..., 3:], x[..., :3].tanh()], -1)), Feed()),
    "order matters": lambda: Net(Apply(lambda x: x.cumsum(-1)), Feed()),
}


def permuted(program: Program, pattern: str) -> tuple[Program, PassReport]:
    passes = PassManager.parse(f"permute{{pattern={pattern}, rounds=1}}")
    after, (report,) = passes.run_reported(program, Context(), check="outputs")
    return after, report


def kept(program: Program) -> float:
    """Magnitude that the patterns of all sites keep."""
    scores = {site: site.read(program.module).detach().abs() for site in program.sites.sparse}
    return sum(float((score * site.choose(score)[1]).sum(dtype=torch.float64)) for site, score in scores.items())


def check(program: Program, pattern: str) -> None:
    after, report = permuted(program, pattern)
    before = program.replace(sites=after.sites)

    gains = sum(variable["gain"] for variable in report.data.get("variables", {}).values())
    assert pytest.approx(kept(after) - kept(before), abs=SUMS * kept(before)) == gains
    assert (report.data.get("difference") or 0.0) <= AGREES
    assert gains >= 0


@pytest.mark.parametrize("pattern", ["1:2", "2:2:5"])
@pytest.mark.parametrize("name", HOSTILE)
def test_gains_come_true_on_hostile_nets(name: str, pattern: str) -> None:
    check(trace(made(HOSTILE[name]), {"x": random(2, 3, 5)}), pattern)


def test_gains_come_true_where_a_table_is_tied() -> None:
    check(trace(made(TiedEmbedding), {"tokens": torch.tensor([[1, 2], [3, 4]])}), "1:2")


def test_groups_of_a_convolution_are_not_exchanged() -> None:
    """Each group is a matrix of its own, and whole matrices would change places."""
    program = trace(made(HOSTILE["grouped convolution"]), {"x": random(2, 3, 5)})

    _, report = permuted(program, "1:2")

    assert any(note.text == "it does not move whole rows or columns of blocks.0.conv.weight" for note in report.notes)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(steps())
def test_gains_come_true_on_random_walks_over_operators(walk: list[Step]) -> None:
    check(trace(made(lambda: Walk(walk)), {"x": random(2, 3, 5)}), "1:2")
