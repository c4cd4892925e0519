"""Gram matrices of calibration data on tile units (AMX) against torch's float32: python tests/bench/bench_gram.py

One thread, thread CPU time, alternately, the best of many. 512 tokens at a time, as `moments.Collector` takes them:
`gram` is the upper triangle of x^T x in strips, `cross` all of x^T x0. The error is the largest of an element, of
sqrt(G_ii G_jj). Exit status 1 where tiles take more than MOST of the time or an element is further off than FURTHEST.
Where there are no tile units the reason is printed, and nothing is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparsec.oneshot import gram
from sparsec.oneshot.moments import _AT_ONCE, _STRIP, _nelement, _strips

COLS = (384, 768, 1536, 2048, 4096)
MOST, FURTHEST = 0.6, 3.2e-5
SECONDS = 1.5  # of each row


def by_torch(x: Tensor, x0: Tensor, sums: Tensor, strip: int) -> None:
    """As `moments.Collector` does it without tiles."""
    for i, part in _strips(sums, x.shape[1], strip):
        torch.addmm(part, x[:, i : i + strip].T, x0[:, i:], beta=0, out=part)


def fastest(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    """CPU seconds by name."""
    best, end = dict.fromkeys(calls, float("inf")), time.monotonic() + SECONDS
    while time.monotonic() < end:
        for name, call in calls.items():
            start = time.thread_time()
            call()
            best[name] = min(best[name], time.thread_time() - start)
    return best


def error(x: Tensor, x0: Tensor, sums: Tensor, strip: int) -> float:
    """Against float64."""
    wide, other = x.double(), x0.double()
    scale, other_scale = wide.norm(dim=0), other.norm(dim=0)
    worst = 0.0
    for i, part in _strips(sums, x.shape[1], strip):
        off = (part - wide[:, i : i + strip].T @ other[:, i:]).abs() / scale[i : i + strip].outer(other_scale[i:])
        worst = max(worst, float(off.max()))
    return worst


def main() -> int:
    """Measure, print and check."""
    torch.set_num_threads(1)
    if not gram.available():
        print("no tile units (AMX) here, or no compiled library: nothing to measure")
        return 0
    missed = False
    print("| moments | cols | torch ms | tiles ms | ratio | error |\n|---|---|---|---|---|---|")
    for cols in COLS:
        x, x0 = torch.randn(2, _AT_ONCE, cols, generator=torch.Generator().manual_seed(0)).unbind()
        for name, other, strip in (("gram", x, _STRIP), ("cross", x0, cols)):
            sums = torch.zeros(_nelement(cols, strip))
            given = (x, other, sums, strip)
            took = fastest({"torch": partial(by_torch, *given), "tiles": partial(gram.add, *given, fresh=True)})
            ratio, off = took["tiles"] / took["torch"], error(x, other, sums, strip)
            missed |= ratio > MOST or off > FURTHEST
            shown = " | ".join(f"{took[one] * 1e3:.2f}" for one in ("torch", "tiles"))
            print(f"| {name} | {cols} | {shown} | {ratio:.2f} | {off:.1e} |")
    print(f"bounds: ratio at most {MOST}, error at most {FURTHEST:g}: {'MISSED' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
