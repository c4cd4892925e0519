"""One product: right to the rounding of bf16, then timed beside torch's dense product and its 2:4 one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from sparsec.backends.kernel.cuda import choice
from sparsec.backends.kernel.cuda.calibrating import chosen, copies, random_weight
from sparsec.backends.kernel.cuda.ceilings import Ceilings
from sparsec.backends.kernel.cuda.linear import panel_linear, side_by_side
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import MOST_DECODED, Activation, Device
from sparsec.pattern import Pattern
from sparsec.semi_structured import semi_structured_linear

from .goals import PATTERNS, Regime
from .machines import Call, Machine

BF16 = torch.bfloat16
RELATIVE = 5e-3  # ||y - expected|| / ||expected||: results are rounded to 8 bits, sums are float32
MOST_CHECKED = 256  # tokens that are compared with float64
STRIPS = 7  # of rows that differ: no power of two, so that a panel in another's place is seen


@dataclass(frozen=True)
class Case:
    """A product of (tokens, cols) with a weight (rows, cols)."""

    regime: Regime
    pattern: str
    rows: int
    cols: int
    tokens: int


@dataclass(frozen=True)
class Scale:
    """Which cases there are, and how many bytes of weights calls rotate through."""

    decode: tuple[tuple[int, int], ...] = ((11008, 4096), (4096, 11008))
    few: tuple[int, ...] = (16,)
    prefill: tuple[tuple[int, int], ...] = ((4096, 4096), (11008, 4096), (4096, 11008))
    many: tuple[int, ...] = (2048, 4096)
    rotated_bytes: int = 256 << 20


REAL = Scale()
SMALL = Scale(((80, 96),), (3,), ((80, 96),), (40,), 1 << 16)


def cases(scale: Scale) -> list[Case]:
    """All, those that musts need first."""
    regimes: list[tuple[Regime, Any, Any]] = [
        ("decode", scale.decode, scale.few),
        ("prefill", scale.prefill, scale.many),
    ]
    return [
        Case(regime, pattern, rows, cols, tokens)
        for regime, shapes, counts in regimes
        for pattern in PATTERNS
        for rows, cols in shapes
        for tokens in counts
    ]


def kernels(scale: Scale, device: Device) -> Iterator[Any]:
    """The variants of kernels that the cases run, to be compiled beforehand."""
    for one in cases(scale):
        yield from of_form(Form(Pattern.parse(one.pattern), one.rows, one.cols), one.tokens, device)


def of_form(form: Form, tokens: int, device: Device, activation: Activation = "none") -> Iterator[Any]:
    """What `panel_linear` runs for a form and so many tokens."""
    for by_token in (True, False):
        yield chosen(form, tokens, device, activation, by_token)


def measure(case: Case, on: Machine, table: Ceilings, scale: Scale, seed: int) -> dict[str, Any]:
    """A row: the case, its error, both medians of everything that ran, and what the model says."""
    torch.manual_seed(seed)
    form = Form(Pattern.parse(case.pattern), case.rows, case.cols)
    panels, weight = (one.to(on.device) for one in made(case.pattern, case.rows, case.cols))
    x, bias = randn(on, case.tokens, case.cols), randn(on, case.rows)
    errors, calls = {}, runs(case, on, panels, weight, x, scale)
    for name, product in products(case, on, panels, weight, bias).items():
        errors[name] = error(product, weight, x, bias, on)
    twice = [{name: on.seconds(each) for name, each in calls.items()} for _ in range(2)]
    predicted = {
        name: choice.seconds(table, kernel, form.pattern, case.rows, case.cols, case.tokens)
        for name, kernel in (("dense", "dense"), ("panels", "panels"), ("cuSPARSELt", "cuSPARSELt"))
        if name in calls
    }  # type: ignore[arg-type]
    return {
        **vars(case), "kernel": next(of_form(form, case.tokens, on.offers())).kernel, "errors": errors,
        "correct": all(one <= RELATIVE for one in errors.values()),
        "seconds": {name: [one[name] for one in twice] for name in calls}, "predicted": predicted,
    }  # fmt: skip


@lru_cache(maxsize=1)
def made(pattern: str, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """(panels, dense weight), for all numbers of tokens that follow each other."""
    return random_weight(pattern, rows, cols, STRIPS)


def randn(on: Machine, *shape: int) -> Tensor:
    """Fresh random numbers."""
    return torch.randn(*shape, device=on.device).to(BF16)


def products(case: Case, on: Machine, panels: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Any]:
    """What must be right: name -> function of x."""

    def ours(x: Tensor, by_token: bool) -> Tensor:
        return panel_linear(x, panels, bias, case.rows, case.pattern, "none", by_token)

    found: dict[str, Any] = {"panels": partial(ours, by_token=True), "panels, turned": partial(ours, by_token=False)}
    if case.pattern == "2:4" and (compressed := on.compressed(weight)) is not None:
        found["cuSPARSELt"] = lambda x: semi_structured_linear(x, compressed, bias)
    return found


def error(product: Any, weight: Tensor, x: Tensor, bias: Tensor, on: Machine) -> float:
    """Of a product, relative to its norm, in float64; infinite where a result is missing: memory held NaN before."""
    rows, tokens = len(weight), len(x)
    torch.full((tokens + 8, rows), torch.nan, dtype=BF16, device=on.device)  # freed at once: results find it there
    y = product(x)
    if y.shape != (tokens, rows) or not bool(torch.isfinite(y).all()):
        return float("inf")
    checked = torch.linspace(0, tokens - 1, min(tokens, MOST_CHECKED), device=on.device).long()
    expected = x[checked].double() @ weight.double().T + bias.double()
    return float((y[checked].double() - expected).norm() / expected.norm())


def runs(case: Case, on: Machine, panels: Tensor, weight: Tensor, x: Tensor, scale: Scale) -> dict[str, list[Call]]:
    """What is timed: name -> calls that rotate through copies of their weights and activations."""
    dense, sparse = copies(weight, scale.rotated_bytes), copies(panels, scale.rotated_bytes)
    inputs = [x, *(randn(on, *x.shape) for _ in range(7))]
    found: dict[str, list[Call]] = {
        "dense": [partial(torch.nn.functional.linear, inputs[i % 8], one) for i, one in enumerate(dense)],
        "panels": [
            partial(panel_linear, inputs[i % 8], one, None, case.rows, case.pattern) for i, one in enumerate(sparse)
        ],
    }
    if case.tokens > MOST_DECODED:
        laid = [side_by_side(one) for one in inputs]
        found["panels, side by side"] = [
            partial(panel_linear, laid[i % 8], one, None, case.rows, case.pattern, "none", False)
            for i, one in enumerate(sparse)
        ]
    if case.pattern == "2:4":
        twos = [on.compressed(one) for one in dense]
        found["cuSPARSELt"] = [
            partial(semi_structured_linear, inputs[i % 8], one, None) for i, one in enumerate(twos) if one is not None
        ]
        found["cuSPARSELt, searched"] = on.searched_2_4(dense, inputs)
    return {name: calls for name, calls in found.items() if calls}
