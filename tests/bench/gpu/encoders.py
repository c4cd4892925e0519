"""Whole encoders under CUDA graphs: every linear layer of a block sparse, as the product installs them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsec.backends.kernel.cuda.calibrating import random_weight
from sparsec.backends.kernel.cuda.linear import panel_linear, side_by_side
from sparsec.backends.kernel.cuda.panels import Form
from sparsec.backends.kernel.cuda.variants import Device
from sparsec.pattern import Pattern
from sparsec.semi_structured import semi_structured_linear

from .goals import Regime
from .layers import STRIPS, of_form, randn
from .machines import Machine

RELATIVE = 3e-2  # of the last hidden state: 24 blocks of layers whose results are rounded to 8 bits
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """An encoder like BERT, and its input."""

    name: str
    regime: Regime | str
    layers: int
    hidden: int
    inner: int
    heads: int
    batch: int
    length: int
    patterns: tuple[str, ...] = ("2:4", "64:2:5", "64:2:8", "128:2:8", "64:2:16")

    @property
    def tokens(self) -> int:
        return self.batch * self.length


LARGE = Shape("BERT-large", "encoder", 24, 1024, 4096, 16, 32, 512)
MINILM = Shape("MiniLM-L6", "small encoder", 6, 384, 1536, 12, 32, 128)
REAL = (LARGE, MINILM, dataclasses.replace(MINILM, batch=1))
SMALL = (Shape("tiny", "encoder", 2, 64, 128, 2, 2, 24),)
_KINDS = ("query", "key", "value", "output", "up", "down")


@dataclass(frozen=True)
class Block:
    """A block's six products; `up` applies its GELU, and `lay` is what is done to the input of several products."""

    query: Product
    key: Product
    value: Product
    output: Product
    up: Product
    down: Product
    heads: int
    lay: Product = lambda x: x

    def __call__(self, x: Tensor) -> Tensor:
        laid = self.lay(x)
        three = (product(laid) for product in (self.query, self.key, self.value))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in three)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = norm(x + self.output(attended))
        return norm(x + self.down(self.up(x)))


def norm(x: Tensor) -> Tensor:
    """Without weights: they change nothing that is measured."""
    return functional.layer_norm(x, x.shape[-1:])


def kernels(shape: Shape, device: Device) -> Iterator[Any]:
    """The variants of kernels that it runs."""
    for pattern in shape.patterns:
        for rows, cols in ((shape.hidden,) * 2, (shape.inner, shape.hidden), (shape.hidden, shape.inner)):
            form = Form(Pattern.parse(pattern), rows, cols)
            yield from of_form(form, shape.tokens, device, "gelu" if rows == shape.inner else "none")


def measure(shape: Shape, pattern: str, on: Machine, seed: int) -> dict[str, Any]:
    """A row: the dense encoder and the sparse one on the same weights, both medians of each, and the difference."""
    torch.manual_seed(seed)
    dense, sparse, twos = [], [], []
    made = {kind: _weight(shape, kind, pattern, on) for kind in _KINDS}
    for _ in range(shape.layers):
        weights = {kind: (w.clone(), panels.clone(), bias.clone()) for kind, (w, panels, bias) in made.items()}
        dense.append(_dense(shape, weights))
        sparse.append(_panels(shape, weights, pattern))
        if pattern == "2:4" and on.compressed(weights["up"][0]) is not None:
            twos.append(_two_of_four(shape, weights, on))
    x = randn(on, shape.batch, shape.length, shape.hidden)
    runs = {"dense": dense, "panels": sparse, **({"cuSPARSELt": twos} if twos else {})}
    replays = {name: on.graphed(partial(_run, blocks, x)) for name, blocks in runs.items()}
    expected = replays["dense"]().double()
    differences = {name: _difference(replay(), expected) for name, replay in replays.items() if name != "dense"}
    twice = [{name: on.seconds([replay]) for name, replay in replays.items()} for _ in range(2)]
    return {
        "regime": shape.regime, "name": shape.name, "pattern": pattern, "batch": shape.batch, "length": shape.length,
        "errors": differences, "correct": all(one <= RELATIVE for one in differences.values()),
        "seconds": {name: [one[name] for one in twice] for name in runs},
    }  # fmt: skip


def _run(blocks: list[Block], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _difference(found: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm())


def _weight(shape: Shape, kind: str, pattern: str, on: Machine) -> tuple[Tensor, Tensor, Tensor]:
    """(dense weight, panels, bias) of a layer."""
    rows = shape.inner if kind == "up" else shape.hidden
    cols = shape.inner if kind == "down" else shape.hidden
    panels, weight = (one.to(on.device) for one in random_weight(pattern, rows, cols, STRIPS))
    return weight, panels, randn(on, rows)


def _dense(shape: Shape, weights: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Block:
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight, bias)

    made = {kind: partial(product, weight=w, bias=b) for kind, (w, _, b) in weights.items()}
    return Block(**{**made, "up": _then_gelu(made["up"])}, heads=shape.heads)


def _panels(shape: Shape, weights: dict[str, tuple[Tensor, Tensor, Tensor]], pattern: str) -> Block:
    def product(x: Tensor, kind: str) -> Tensor:
        weight, panels, bias = weights[kind]
        up = kind == "up"  # its tokens lie side by side, as `down` reads them
        return panel_linear(x, panels, bias, len(weight), pattern, "gelu" if up else "none", not up)

    return Block(**{kind: partial(product, kind=kind) for kind in _KINDS}, heads=shape.heads, lay=side_by_side)


def _two_of_four(shape: Shape, weights: dict[str, tuple[Tensor, Tensor, Tensor]], on: Machine) -> Block:
    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return semi_structured_linear(x, weight, bias)

    made = {kind: partial(product, weight=on.compressed(w), bias=b) for kind, (w, _, b) in weights.items()}
    return Block(**{**made, "up": _then_gelu(made["up"])}, heads=shape.heads)


def _then_gelu(product: Product) -> Product:
    return lambda x: functional.gelu(product(x))
