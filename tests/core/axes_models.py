"""The proof that every variable of a program is one, and small nets that are hard for a channel-axis analysis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from sparsec import _fx
from sparsec.axes import Axes, Variable, analyse
from sparsec.axes.moves import apply
from sparsec.program import Program

DOUBLE_AGREES = 1e-9  # relative: float64 has 1e-16, and no graph here sums more than some thousand terms in a row
DETECTABLE = 1e-6  # a change that a wrong permutation makes is far above rounding


def prove(program: Program, seed: int = 0) -> Axes:
    """Analyse a program and check in float64 that a random permutation of every variable leaves its outputs alone.

    The graph is copied, its weights are moved to random places near their own (so that no layer scale of 1 or bias of
    0 hides a wrong claim) and every float type named in it becomes float64. Returns the analysis.
    """
    axes = analyse(program)
    generator = torch.Generator().manual_seed(seed)
    reference = in_double(program, generator)
    expected = run(reference)
    together = reference
    for variable in axes.variables:
        permutation = shuffled(variable, generator)
        together = apply(together, variable, permutation)
        assert_equal(expected, run(apply(reference, variable, permutation)), variable.name)
    assert_equal(expected, run(together), "all variables, one after the other")
    return axes


def shuffled(variable: Variable, generator: torch.Generator) -> Tensor:
    """A random permutation of a variable, never the identity."""
    permutation = torch.rand(variable.shape, generator=generator).argsort(-1)
    return permutation.roll(1, -1) if torch.equal(permutation, permutation.sort(-1).values) else permutation


def in_double(program: Program, generator: torch.Generator) -> Program:
    """A copy whose parameters, buffers, inputs and types named in the graph are float64, weights moved at random."""
    program = program.clone()
    module = program.module
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.is_floating_point():
            wide = value.detach().double()
            if isinstance(value, nn.Parameter):
                noise = torch.randn(wide.shape, generator=generator, dtype=torch.float64)
                wide = nn.Parameter(wide + 0.1 * noise)
            _fx.set_tensor(module, name, wide)
    for node in module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, _widened)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, _widened)
    module.recompile()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in program.inputs.items()}
    return program.replace(inputs=inputs)


def _widened(value: object) -> object:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def run(program: Program) -> dict[str, Tensor]:
    with torch.no_grad():
        return program(**program.inputs)


def assert_equal(expected: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
    for key, value in expected.items():
        if value.is_floating_point():
            assert value.isfinite().all(), f"{key} is not finite, so nothing is proven"
        assert difference(value, found[key]) <= DOUBLE_AGREES, f"{what} changes {key}"


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    if not expected.numel():
        return 0.0
    scale = expected.double().abs().max().item()
    return (expected.double() - found.double()).abs().max().item() / max(scale, 1e-30)


def summary(axes: Axes) -> str:
    """Numbers of variables by kind, such as `free 4, order 2, within 4`; `order/head` where they differ by head."""
    counts: dict[str, int] = {}
    for variable in axes.variables:
        key = variable.kind + ("/head" if variable.per and variable.kind == "order" else "")
        counts[key] = counts.get(key, 0) + 1
    return ", ".join(f"{key} {counts[key]}" for key in sorted(counts))


def moved(axes: Axes) -> dict[str, set[str]]:
    """What each variable moves, as `up.weight:0`, by the variable's name."""
    return {v.name: {f"{move.tensor}:{dim}" for move in v.moves for dim in move.dims} for v in axes.variables}


WIDTH, TOKENS = 8, 3
Function = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A first layer that makes the width free, blocks, and a head that makes it an output no more."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.head = nn.Linear(5, WIDTH), nn.ModuleList(blocks), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Apply(nn.Module):
    """A function along the width, on its own."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Feed(nn.Module):
    """x + down(act(up(norm(x)))); `gated` splits up's result by chunk."""

    def __init__(self, gated: bool = False, hidden: int = 6) -> None:
        super().__init__()
        self.gated, self.norm = gated, nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden * (1 + gated)), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(self.norm(x))
        if self.gated:
            gate, hidden = hidden.chunk(2, -1)
            hidden = functional.silu(gate) * hidden
        return x + self.down(functional.gelu(hidden))


Fused = Literal["no", "chunk", "view"]


class Attention(nn.Module):
    """Two key heads of size 4, each serving `served` query heads; projections apart, or fused in two ways."""

    def __init__(self, sdpa: bool = True, fused: Fused = "no", served: int = 1, rope: bool = False) -> None:
        super().__init__()
        self.sdpa, self.fused, self.served, self.rope = sdpa, fused, served if fused != "view" else 1, rope
        sizes = [8 * self.served, 8, 8]
        self.sizes = sizes
        if fused == "no":
            self.query, self.key, self.value = (nn.Linear(WIDTH, size) for size in sizes)
        else:
            self.qkv = nn.Linear(WIDTH, sum(sizes))
        self.out = nn.Linear(8 * self.served, WIDTH)
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._projected(x)
        if self.rope:
            query, key = self._rotated(query), self._rotated(key)
        if self.served > 1:
            key, value = (self._repeated(heads) for heads in (key, value))
        if self.sdpa:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) / 2).softmax(-1) @ value
        return x + self.out(mixed.transpose(1, 2).reshape(x.shape[0], TOKENS, -1))

    def _projected(self, x: Tensor) -> list[Tensor]:
        if self.fused == "view":
            return list(self.qkv(x).view(-1, TOKENS, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0))
        parts = (
            self.qkv(x).split(self.sizes, -1) if self.fused == "chunk" else [self.query(x), self.key(x), self.value(x)]
        )
        return [part.view(-1, TOKENS, part.shape[-1] // 4, 4).transpose(1, 2) for part in parts]

    def _rotated(self, heads: Tensor) -> Tensor:
        angles = torch.arange(TOKENS)[:, None] * self.frequencies
        angles = torch.cat([angles, angles], -1)
        half = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
        return heads * angles.cos() + half * angles.sin()

    def _repeated(self, heads: Tensor) -> Tensor:
        batch, count, tokens, size = heads.shape
        expanded = heads[:, :, None].expand(batch, count, self.served, tokens, size)
        return expanded.reshape(batch, count * self.served, tokens, size)


class Norm(nn.Module):
    """Functional group norm of the channels."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups, self.weight = groups, nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return functional.group_norm(x.transpose(1, 2), self.groups, self.weight).transpose(1, 2)


class Convolution(nn.Module):
    """Channels by channels in groups, three tokens wide, then batch norm."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=groups), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)


class Constant(nn.Module):
    """Channels times a constant of the model's code."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Twice(nn.Module):
    """One block, called twice."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


class Square(nn.Module):
    """One square weight on both sides of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) @ self.weight


class TwoDims(nn.Module):
    """Layer norm over tokens and channels together."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm([TOKENS, WIDTH])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Flatten(nn.Module):
    """Tokens and channels as one axis, there and back."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.back = nn.Linear(TOKENS * WIDTH, 6), nn.Linear(6, TOKENS * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.back(torch.relu(self.mix(x.flatten(1)))).view(-1, TOKENS, WIDTH)


class Heads(nn.Module):
    """Channels in 2 heads: their own softmax, and a mix of heads where `across`."""

    def __init__(self, heads: int = 2, across: bool = False) -> None:
        super().__init__()
        self.heads, self.across, self.project = heads, across, nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        split = self.project(x).unflatten(-1, (self.heads, WIDTH // self.heads))
        mixed = split.softmax(-2) if self.across else split.softmax(-1)
        return x + self.out(mixed.flatten(2))


class Experts(nn.Module):
    """Every token through every expert, by batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(2, WIDTH, 6)), nn.Parameter(torch.zeros(2, 6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(x.flatten(0, 1)[None] @ self.up)
        return (hidden @ self.down).sum(0).view(x.shape)


class TiedEmbedding(nn.Module):
    """A table that is looked up and multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH)
        self.block = Feed()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.block(self.table(tokens)) @ self.table.weight.T


class Punctuation(nn.Module):
    """Modules a.b and a_b, whose names as graph nodes are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.b, self.a_b = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 6)
        self.a_b_1 = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a_b_1(torch.relu(self.a_b(torch.tanh(self.a.b(x)))))


Step = tuple[str, int, int]
STEPS = """
split merge swap grow linear experts scale softmax cumsum roll sum reduce cut half outer product add keep repeat norm
pick attention
""".split()
_LARGEST, _RANK = 600, 5


class Walk(nn.Module):
    """A random walk over tensor operators: each step is (name, number, number), and does nothing where it cannot."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps, self.weights = steps, nn.ParameterList()
        self.growing = True
        self.forward(torch.zeros(2, TOKENS, 5))
        self.growing = False

    def forward(self, x: Tensor) -> Tensor:
        self.used = 0
        x = functional.linear(x, self._weight(WIDTH, 5))
        kept: list[Tensor] = []
        for name, a, b in self.steps:
            x = self._step(name, a, b, x, kept)
            x = x / (1 + x.abs().amax(tuple(range(1, x.dim())), keepdim=True))
        flat = x.flatten(1)
        return functional.linear(torch.sin(flat), self._weight(2, flat.shape[1]))

    def _weight(self, *shape: int) -> Tensor:
        if self.growing:
            self.weights.append(nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5))
        self.used += 1
        return self.weights[self.used - 1]

    def _step(self, name: str, a: int, b: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        sizes, rank = list(x.shape[1:]), x.dim()
        i, j = 1 + a % (rank - 1), 1 + b % (rank - 1)
        size = sizes[i - 1]
        small = rank < _RANK and torch.Size(sizes).numel() * 3 <= _LARGEST
        divisors = [d for d in range(2, size) if size % d == 0]
        if name == "split" and divisors and rank < _RANK:
            outer = divisors[b % len(divisors)]
            return x.unflatten(i, (outer, size // outer))
        if name == "merge" and i + 1 < rank:
            return x.flatten(i, i + 1)
        if name == "swap":
            return x.transpose(i, j)
        if name == "grow" and small:
            return x.unsqueeze(i) * self._weight(3, *(1 for _ in sizes[i - 1 :]))
        if name == "linear":
            return functional.linear(x, self._weight((4, 6, 8)[b % 3], sizes[-1]))
        if name == "experts" and rank > 2:
            return x @ self._weight(*sizes[:-2], sizes[-1], (4, 6)[b % 2])
        if name == "scale":
            return x * self._weight(*(s if (a >> k) & 1 or k == j - 1 else 1 for k, s in enumerate(sizes)))
        if name == "softmax":
            return x.softmax(i) * 3
        if name == "cumsum":
            return x.cumsum(i)
        if name == "roll":
            return x.roll(1, i)
        if name == "sum":
            return torch.sin(x) + x.sum(i, keepdim=True)
        if name == "reduce" and rank > 2:
            return torch.sin(x).sum(i)
        if name == "cut" and size > 1:
            at = 1 + b % (size - 1)
            first, second = x.split([at, size - at], i)
            return torch.cat([torch.tanh(second), first] if b & 1 else [torch.tanh(first), second], i)
        if name == "half" and size % 2 == 0:
            first, second = x.chunk(2, i)
            return torch.sin(first) * second + first
        if name == "outer" and small and size <= 4:
            return x.unsqueeze(i) * torch.sin(x).unsqueeze(i + 1)
        if name == "product" and rank > 2:
            return (x @ x.transpose(-1, -2)) @ torch.sin(x)
        if name == "attention" and rank > 2:
            return functional.scaled_dot_product_attention(x, torch.sin(x), torch.cos(x))
        if name == "add":
            return next((x + torch.cos(old) for old in reversed(kept) if old.shape == x.shape), x)
        if name == "keep":
            kept.append(x)
        if name == "repeat" and small:
            copies = [1] * rank
            copies[i] = 2
            return x.repeat(copies) if b & 1 else x.repeat_interleave(2, i)
        if name == "norm":
            return functional.layer_norm(x, sizes[i - 1 :])
        if name == "pick" and rank > 2:
            return torch.sin(x) + x.select(i, b % size).unsqueeze(i)
        return x


def steps() -> st.SearchStrategy[list[Step]]:
    number = st.integers(0, 7)
    return st.lists(st.tuples(st.sampled_from(STEPS), number, number), min_size=1, max_size=10)
