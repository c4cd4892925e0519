"""Dynamic sizes: a graph is handed out only if it is right for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import made, random
from torch import Tensor, nn

from sparsec import trace
from sparsec.errors import TraceError


class Branches(nn.Module):
    """Computes something else for some lengths, as Python code that looks at a size does."""

    def __init__(self, factor: float, special: Callable[[int], bool]) -> None:
        super().__init__()
        self.fc, self.factor, self.special = nn.Linear(4, 4), factor, special

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * (self.factor if self.special(x.shape[1]) else 2.0)


def short(length: int) -> bool:
    return length < 4


def three(length: int) -> bool:
    return length == 3


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (three, r"at length 3 the model computes something else .*limits=\{'length': \(smallest, largest\)"),
        (short, r"one graph holds for length 4 to 8; give limits=\{'length': \(4, 8\)\}"),
    ],
)
def test_a_branch_on_a_size_is_refused_with_the_sizes_it_concerns(special: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(made(lambda: Branches(3.0, special)), (random(2, 5, 4),), {"x": {1: "length"}}, {"length": 8})


@pytest.mark.parametrize("special", [short, three])
def test_a_range_without_the_branch_is_traced(special: Any) -> None:
    model = made(lambda: Branches(3.0, special))
    program = trace(model, (random(2, 5, 4),), {"x": {0: "batch", 1: "length"}}, {"length": (4, 9)})

    assert {"batch": (1, None), "length": (4, 9)} == program.dims
    for length in (4, 9):
        x = random(3, length, 4)
        with torch.no_grad():
            assert torch.equal(model(x), program(x)["output"])


def test_a_branch_that_makes_no_difference_is_proven_and_kept() -> None:
    model = made(lambda: Branches(2.0, three))
    program = trace(model, (random(2, 5, 4),), {"x": {1: "length"}}, {"length": 8})

    for length in (1, 3, 8):
        x = random(2, length, 4)
        with torch.no_grad():
            assert torch.equal(model(x), program(x)["output"])


def test_a_size_too_large_to_be_tried_ends_the_range() -> None:
    model = made(lambda: Branches(3.0, lambda length: length == 5000))
    program = trace(model, (random(2, 5, 4),), {"x": {1: "length"}}, {"length": 5000})

    assert {"length": (1, 4999)} == program.dims


class Cached(nn.Module):
    """A decoder's habit: a configuration that asks for a cache, and random parts by other names."""

    class Config:
        def __init__(self) -> None:
            self.use_cache, self.apply_spec_augment, self.router_jitter_noise = True, True, 0.25

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.config = nn.Linear(4, 4), Cached.Config()

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.fc(x)
        if self.training and (self.config.apply_spec_augment or self.config.router_jitter_noise):
            y = y + torch.rand_like(y)
        return {"y": y, "hidden": (y, x), "cache": [y] if self.config.use_cache else None}


def test_caches_are_off_while_tracing_and_restored() -> None:
    model = made(Cached)
    program = trace(model, (random(2, 4),))

    assert (True, True, 0.25) == tuple(vars(model.config).values())
    assert ["config.apply_spec_augment", "config.router_jitter_noise"] == program.origin["set_to_zero"]
    assert ["hidden"] == program.origin["dropped_outputs"]
    assert ["y"] == list(program(random(2, 4)))


def test_a_parameter_no_output_depends_on_is_listed() -> None:
    class Unread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.rest = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    program = trace(made(Unread), (random(2, 4),))

    unused = {entry.name: entry.reason for entry in program.sites.exclusions if entry.role == "unused"}
    assert {"rest.weight", "rest.bias"} == unused.keys()
    assert all("no output depends on it" in reason for reason in unused.values())


class Loops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        return -x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.inner = nn.Linear(4, 4), Loops()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


def test_data_dependent_code_is_named_with_its_module_and_line() -> None:
    with pytest.raises(TraceError, match=r"inner, .*test_sizes\.py:\d+: `if x\.sum\(\) > 0:`") as caught:
        trace(made(Outer), (random(2, 4),))
    assert "\n" not in str(caught.value)
