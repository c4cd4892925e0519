"""What figures hold for, and when they are not to be believed."""

from __future__ import annotations

import pytest

from sparsec import machine


def test_the_line_names_every_fact_and_each_thread_count_once() -> None:
    facts = {**machine.facts(), "processor": "Some CPU", "cores": 4, "kernels": "avx2"}

    line = machine.line(facts, [1, 1, 2])
    assert line.startswith("Some CPU, 4 cores; threads 1, 2; kernels avx2; torch ")
    assert all(str(facts[key]) in line for key in ("torch", "torch_kernels", "onnxruntime", "sparsec"))


@pytest.mark.parametrize(
    ("load", "threads", "cautious"),
    [(0.2, [1, 2], False), (4.5, [1], False), (4.5, [1, 2], True), (1.0, [2], True), (2.0, [1, 4], True)],
)
def test_wall_times_of_several_threads_are_doubted_on_a_busy_machine(
    load: float, threads: list[int], cautious: bool
) -> None:
    said = machine.caution({"load": load, "cores": 2}, threads)

    assert cautious == (said is not None)
    assert said is None or f"load was {load} on 2 cores" in said
