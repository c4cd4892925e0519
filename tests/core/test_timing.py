"""What is timed in turns, by which clock, and inputs of the sizes that were asked for."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsec import timing
from sparsec.errors import UsageError

TYPES = {"ids": "int64[batch, length]", "image": "float32[batch, 3, 4]"}
EXAMPLE = {"ids": torch.arange(6).view(2, 3), "image": torch.zeros(2, 3, 4)}
DIMS = {"batch": (1, None), "length": (1, 40)}


class Clock:
    """A clock that calls move on, by what they are told to take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.cpu = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "thread_time", lambda: self.cpu)

    def spend(self, cpu: float, waiting: float = 0.0) -> None:
        self.cpu += cpu
        self.now += cpu + waiting


def test_both_clocks_are_read_and_the_fastest_tenth_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    took = itertools.cycle([5.0, 0.125, 1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0])  # 0.125: the clock skipped

    found = timing.interleaved({"a": lambda: clock.spend(next(took), waiting=0.5)}, budget_seconds=25.0)

    assert timing.Times(cpu=1.0, wall=1.5) == found["a"]


def test_runs_take_turns_after_one_to_warm_up_and_at_least_three(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(monkeypatch), []

    def run(name: str) -> None:
        order.append(name)
        clock.spend(100.0)

    timing.interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, budget_seconds=1.0, in_a_row=2)

    assert "".join(order) == "ab" + 3 * "aabb"


def test_one_thread_is_judged_by_its_processor_time_and_several_by_wall_time() -> None:
    times = {"a": timing.Times(cpu=1.0, wall=2.0)}

    assert {"a": 1.0} == timing.judged(times, threads=1)
    assert {"a": 2.0} == timing.judged(times, threads=2)
    assert ["thread CPU time", "wall time"] == [timing.clock(1), timing.clock(2)]


@given(st.integers(1, 9), st.integers(1, 40))
def test_inputs_have_the_size_and_repeat_the_example(batch: int, length: int) -> None:
    found = timing.inputs_for_size(EXAMPLE, TYPES, DIMS, batch, length)

    assert (batch, length) == found["ids"].shape
    assert (batch, 3, 4) == found["image"].shape
    assert all(
        int(found["ids"][b, t]) == int(EXAMPLE["ids"][b % 2, t % 3]) for b in range(batch) for t in range(length)
    )


@pytest.mark.parametrize(
    ("dims", "says"),
    [
        ({"batch": (1, None), "length": (1, 8)}, "8x9: this model takes a length of 1 to 8"),
        ({"batch": (9, None), "length": (1, 9)}, "8x9: this model takes a batch of 9 to any number"),
        ({"batch": (1, None)}, "8x9: this model's length is fixed; give --tokens instead"),
        ({}, "8x9: this model's batch is fixed"),
    ],
)
def test_a_size_that_the_model_does_not_take_is_refused(dims: dict[str, tuple[int, int | None]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        timing.inputs_for_size(EXAMPLE, TYPES, dims, 8, 9)
