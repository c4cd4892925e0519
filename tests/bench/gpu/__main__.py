"""The GPU kernels on a real GPU, in one command: python -m tests.bench.gpu [--out FOLDER] [--limit SECONDS]

At most eight minutes on an H200. Measures the ceilings that the cost model rests on (they are kept for this machine),
then products, decode and prefill of Llama's shapes, and whole encoders under CUDA graphs: right to the rounding of bf16
against float64, on fresh random numbers, in memory that held NaN before; then median times, twice, beside torch's dense
product and its 2:4 one with algorithm search. Writes NAME.md, data/NAME.json and NAME.svg. Exit status 1 when a result
is wrong or a must (goals.py) is missed or was not reached in time.

    --dry-run    the same code on the CPU, small, on the kernels' reference: results are checked, times mean nothing,
                 and everything that is written says so; goals are not judged
    --build ARCH compile what would run, for sm_90a or another GPU, into the cache; needs NVRTC, no GPU

Memory errors and races, on a GPU, with small shapes (compute-sanitizer comes with the CUDA toolkit):

    compute-sanitizer --tool memcheck python -m pytest -q tests/backends/kernel/cuda/test_on_gpu.py -k "products and 33"
    the same with --tool racecheck

Where a must is missed: ncu --set full -k regex:'gemm|window|decode' python -m tests.bench.gpu --only 64:2:8
and look at lts__throughput (L2), l1tex bank conflicts (shared memory) and the tensor pipe, in this order.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sparsec.backends.kernel.cuda import ahead, calibrating
from sparsec.backends.kernel.cuda.ceilings import H200
from sparsec.backends.kernel.cuda.driver import cannot_run
from sparsec.backends.kernel.cuda.variants import Device

from . import encoders, layers, report
from .goals import PATTERNS, Regime, judge
from .machines import Machine, here

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder to write to; default: docs/results, or a new one")
    parser.add_argument("--limit", type=float, default=480, help="seconds that all of it may take")
    parser.add_argument("--only", choices=PATTERNS, help="the products of one pattern")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument("--build", metavar="ARCH", help="only compile, for this GPU")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + given.limit
    if given.build:
        count = compiled(dataclasses.replace(H200.device, arch=given.build), (layers.REAL, encoders.REAL))
        print(f"{count} kernels for {given.build} are in the cache")
        return 0
    if not given.dry_run and (reason := cannot_run()):
        print(f"nothing can be measured: {reason}; --dry-run rehearses on the CPU")
        return 2
    on = here(given.dry_run)
    scales = (layers.SMALL, encoders.SMALL) if given.dry_run else (layers.REAL, encoders.REAL)
    if not given.dry_run:
        compiled(on.offers(), scales)
    with torch.no_grad():
        result = measured(on, scales, given.only, deadline)
    rows = [*result["layers"], *result["encoders"]]
    judged = judge(rows, expected(scales))
    if given.only:
        judged = [one for one in judged if one.goal.pattern == given.only and one.goal.regime != "encoder"]
    partly = given.dry_run or given.only
    folder = given.out or (Path(tempfile.mkdtemp(prefix="gpu-bench-")) if partly else ROOT / "docs/results")
    name = "dry-run-gpu" if given.dry_run else "gpu-" + on.name.removeprefix("NVIDIA ").replace(" ", "-").lower()
    print(report.text(result, judged, ""))
    print("written: " + ", ".join(map(str, report.write(result, judged, folder, name))))
    if wrong := [row for row in rows if not row["correct"]]:
        print(f"{len(wrong)} wrong results, the first: {wrong[0]}")
        return 1
    missed = [f"{one.goal.regime} {one.goal.pattern}" for one in judged if not one.met]
    if given.dry_run:
        print(report.REHEARSED)
        return 0
    print("musts: " + (f"missed: {', '.join(missed)}" if missed else "all reached"))
    return int(bool(missed))


def compiled(device: Device, scales: tuple[layers.Scale, tuple[encoders.Shape, ...]]) -> int:
    """Compile all that runs into the cache; how many there are."""
    whole = (encoders.kernels(one, device) for one in scales[1])
    wanted = chain(calibrating.kernels(device, calibrating.Sizes()), layers.kernels(scales[0], device), *whole)
    return ahead.compile_all(wanted, device.arch)


def measured(
    on: Machine, scales: tuple[layers.Scale, tuple[encoders.Shape, ...]], only: str | None, deadline: float
) -> dict[str, Any]:
    """All rows; a case that would begin after the deadline is left out by name."""
    table = on.ceilings()
    left_out: list[str] = []

    def in_time(name: str) -> bool:
        if time.monotonic() > deadline:
            left_out.append(name)
            return False
        return True

    whole = [] if only else [(shape, pattern) for shape in scales[1] for pattern in shape.patterns]
    found = [
        encoders.measure(shape, pattern, on, seed)
        for seed, (shape, pattern) in enumerate(whole)
        if in_time(f"{shape.name} {shape.batch}x{shape.length} {pattern}")
    ]
    rows = [
        layers.measure(one, on, table, scales[0], seed)
        for seed, one in enumerate(layers.cases(scales[0]), 1000)
        if only in (None, one.pattern) and in_time(f"{one.pattern} {one.rows}x{one.cols} T={one.tokens}")
    ]
    note = {"note": report.REHEARSED} if on.rehearses else {}
    return {
        **note, "rehearsed": on.rehearses, "facts": on.facts(), "ceilings": dataclasses.asdict(table), "layers": rows,
        "encoders": found, "left_out": left_out,
    }  # fmt: skip


def expected(scales: tuple[layers.Scale, tuple[encoders.Shape, ...]]) -> dict[tuple[Regime, str], int]:
    """How many cases each goal has."""
    counts: dict[Any, int] = {}
    for one in layers.cases(scales[0]):
        counts[one.regime, one.pattern] = counts.get((one.regime, one.pattern), 0) + 1
    for shape in scales[1]:
        for pattern in shape.patterns:
            counts[shape.regime, pattern] = counts.get((shape.regime, pattern), 0) + 1
    return counts


if __name__ == "__main__":
    sys.exit(main())
