"""Which variant of a kernel runs a product: its macros (see device.cuh), and the grid that covers the product."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

import torch

from sparsec.backends.kernel.cuda.panels import ROWS, Form

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)  # a name's place is its number in the sources

_FEW = (8, 16, 32)  # tokens that decode.cu is compiled for
_PANEL_BYTES = 4096 + 512 + 64  # of a step: values, metadata, and indices of places in a window
MOST_DECODED = _FEW[-1]  # tokens for which decode.cu is used, where there is a window


@dataclass(frozen=True)
class Device:
    """What a GPU offers a kernel: its multiprocessors, and the bytes of shared memory of a thread block."""

    arch: str
    multiprocessors: int
    shared_bytes: int


@dataclass(frozen=True)
class Tile:
    """How gemm.cu cuts a product: tokens and warps of a thread block, panels of a warp, steps in flight."""

    tokens: int
    warps_m: int = 4
    warps_n: int = 2
    panels: int = 1
    stages: int = 3


@dataclass(frozen=True)
class Gemm:
    """gemm.cu for the weights of a form and one tile."""

    form: Form
    dtype: torch.dtype
    tile: Tile
    activation: Activation = "none"
    by_token: bool = True
    kernel: str = field(default="gemm", init=False)

    @property
    def macros(self) -> dict[str, int]:
        tile = self.tile
        return common_macros(self.form, self.dtype, self.activation) | {
            "TOKENS": tile.tokens, "STAGES": tile.stages, "BY_TOKEN": int(self.by_token), "WARPS_M": tile.warps_m,
            "WARPS_N": tile.warps_n, "PANELS": tile.panels,
        }  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self.tile.warps_m * self.tile.warps_n

    @property
    def shared_bytes(self) -> int:
        """Stages of activations and of indices, or the results on their way out."""
        tile, tables = self.tile, self.tile.warps_m * self.form.blocks
        lines, index_bytes = (16 * self.form.window, 64) if self.form.window else (64 * tables, 256)
        index_stages = tile.stages if self.form.window else 2 * tile.stages - 1
        staged = tile.stages * lines * 2 * tile.tokens + index_stages * tables * index_bytes
        turned = 2 * tile.tokens * (ROWS * tile.panels * tile.warps_m + 8) if self.by_token else 0
        return max(staged, turned)

    def grid(self, tokens: int) -> tuple[int, int]:
        """Thread blocks along tokens and rows."""
        return math.ceil(tokens / self.tile.tokens), math.ceil(
            self.form.panels / (self.tile.warps_m * self.tile.panels)
        )


@dataclass(frozen=True)
class Window(Gemm):
    """window.cu, which gives gemm.cu's results.

    multicast: thread blocks that share one copy of activations, and of weights; a cluster is all of them.
    """

    multicast: tuple[int, int] = (2, 2)
    kernel: str = field(default="window", init=False)

    @property
    def macros(self) -> dict[str, int]:
        return super().macros | dict(zip(("CLUSTER_M", "CLUSTER_N"), self.multicast, strict=True))

    @property
    def threads(self) -> int:
        return super().threads + 128

    @property
    def lines(self) -> int:
        """Of the window, a thread block copies to all that share it."""
        return 16 * self.form.window // self.multicast[0]

    @property
    def stage_bytes(self) -> int:
        """A step's window and panels, up to a multiple of 1024, and two barriers."""
        tile = self.tile
        step = 32 * self.form.window * tile.tokens + tile.warps_m * tile.panels * _PANEL_BYTES
        return math.ceil(step / 1024) * 1024 + 16

    @property
    def shared_bytes(self) -> int:
        return self.tile.stages * self.stage_bytes

    def grid(self, tokens: int) -> tuple[int, int]:
        """Whole clusters."""
        (along_tokens, along_rows), (rows, columns) = super().grid(tokens), self.multicast
        return math.ceil(along_tokens / columns) * columns, math.ceil(along_rows / rows) * rows


@dataclass(frozen=True)
class Decode:
    """decode.cu for the weights of a form: at most `tokens` tokens, 8, 16 or 32."""

    form: Form
    dtype: torch.dtype
    tokens: int
    panels: int = 1
    warps: int = 8
    stages: int = 2
    activation: Activation = "none"
    kernel: str = field(default="decode", init=False)

    @property
    def macros(self) -> dict[str, int]:
        return common_macros(self.form, self.dtype, self.activation) | {
            "TOKENS": self.tokens, "STAGES": self.stages, "WARPS": self.warps, "PANELS": self.panels,
        }  # fmt: skip

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def shared_bytes(self) -> int:
        """Windows of all warps, then their sums."""
        windows = self.stages * self.tokens * (32 * self.form.window + 16)
        return self.warps * max(windows, 4 * ROWS * self.panels * self.tokens)

    def grid(self, splits: int) -> tuple[int, int]:
        """Thread blocks that share rows, and groups of rows."""
        return splits, math.ceil(self.form.panels / self.panels)

    @property
    def partial_floats(self) -> int:
        """Sums that one split leaves in the workspace."""
        return ROWS * self.panels * self.tokens * self.grid(1)[1]


def common_macros(form: Form, dtype: torch.dtype, activation: Activation) -> dict[str, int]:
    """Those of all kernels."""
    return {
        "WINDOW": form.window, "BLOCKS": form.blocks, "MOVED": int(form.moved), "FP16": int(dtype == torch.float16),
        "ACTIVATION": ACTIVATIONS.index(activation),
    }  # fmt: skip


@lru_cache(maxsize=4096)
def gemm(
    form: Form, dtype: torch.dtype, tokens: int, device: Device, activation: Activation = "none", by_token: bool = True
) -> Gemm:
    """The variant of gemm.cu, or of window.cu, that is expected to be fastest for so many tokens: not measured.

    A round of thread blocks of gemm.cu takes time for its tokens, and for reading the weights, as for 32 tokens more.
    """
    if not no_window(form, tokens, device):
        return _window(form, dtype, tokens, device, activation, by_token)

    def rounds(one: Gemm) -> int:
        return math.ceil(math.prod(one.grid(tokens)) / device.multiprocessors) * (one.tile.tokens + 32)

    return min(_fitting(form, dtype, device, activation, by_token), key=rounds)


def every(
    form: Form, dtype: torch.dtype, device: Device, activation: Activation = "none", by_token: bool = True
) -> set[Gemm | Decode]:
    """All that a product of a form may run on a device, whatever its number of tokens.

    1. gemm.cu: of tiles for as many tokens only the first that fits is ever chosen.
    2. window.cu: thread blocks along tokens are counted up to 8 only, and many tokens fill every device.
    3. Where decode.cu has no window, few tokens are multiplied by gemm.cu, and lie by token (`panel_linear`).
    """
    many = {one.tile.tokens: one for one in reversed(_fitting(form, dtype, device, activation, by_token))}
    counts = [128 * blocks for blocks in (*range(1, 9), 2 * max(device.multiprocessors, 9))]
    found: set[Gemm | Decode] = {
        _window(form, dtype, tokens, device, activation, by_token)
        for tokens in counts
        if not no_window(form, tokens, device)
    }
    if no_window(form, MOST_DECODED + 1, device):
        found |= set(many.values())
    if form.window:
        return found | {decode(form, dtype, tokens, device, activation) for tokens in _FEW}
    return found | {gemm(form, dtype, MOST_DECODED, device, activation, True)}


def no_window(form: Form, tokens: int, device: Device) -> str | None:
    """Why gemm.cu multiplies so many tokens, and not window.cu, or None."""
    if device.arch != "sm_90a":
        return f"window.cu is for Hopper (sm_90a), and this GPU is {device.arch}"
    if not form.window:
        return f"{form.pattern}: columns from anywhere have no window"
    if form.blocks > 1:
        return f"{form.pattern}: {form.blocks} blocks of rows in a panel have columns of their own"
    blocks = math.prod(_window(form, torch.bfloat16, tokens, device).grid(tokens))
    if blocks < device.multiprocessors:
        return f"{blocks} thread blocks for {tokens} tokens leave some of {device.multiprocessors} processors idle"
    return None


def _window(
    form: Form, dtype: torch.dtype, tokens: int, device: Device, activation: Activation = "none", by_token: bool = True
) -> Window:
    """As many stages as fit; two thread blocks of a cluster along each side, unless that wastes much of the grid."""
    shape = (128, 2, 4, 2) if _shared(form) else (128, 4, 2, 1)
    single = Window(form, dtype, Tile(*shape, stages=1), activation, by_token, (1, 1))
    stages = min(5, device.shared_bytes // single.stage_bytes)
    along_tokens, along_rows = (2 if count % 2 == 0 or count > 8 else 1 for count in single.grid(tokens))
    return Window(form, dtype, Tile(*shape, stages=stages), activation, by_token, (along_rows, along_tokens))


def decode(form: Form, dtype: torch.dtype, tokens: int, device: Device, activation: Activation = "none") -> Decode:
    """For at most MOST_DECODED tokens, of a form with a window.

    Two panels of a thread block read a window once. That counts from 9 tokens on, where windows are as much to read as
    weights: there they need no more than a thread block for every multiprocessor.
    """
    padded = next(size for size in _FEW if size >= tokens)

    def of(panels: int) -> Decode:
        sizes = (Decode(form, dtype, padded, panels, warps, 2, activation) for warps in (8, 4, 2))
        # Half of the shared memory, so that two thread blocks fit a multiprocessor.
        return next(one for one in sizes if one.shared_bytes <= device.shared_bytes // 2 or one.warps == 2)

    two = of(2)
    blocks = math.prod(two.grid(splits(two, device) if padded > 8 else 1))
    enough = device.multiprocessors * (1 if padded > 8 else 2)
    return two if padded <= 16 and blocks >= enough else of(1)


def splits(variant: Decode, device: Device) -> int:
    """How many thread blocks share the rows of one: two for every multiprocessor in all, each warp with a step."""
    groups = variant.grid(1)[1]
    most = math.ceil(variant.form.steps / variant.warps)
    return max(1, min(most, math.ceil(2 * device.multiprocessors / groups)))


def _fitting(form: Form, dtype: torch.dtype, device: Device, activation: Activation, by_token: bool) -> list[Gemm]:
    """gemm.cu by every tile that fits the device, best first where they take as long."""
    fitting = [Gemm(form, dtype, tile, activation, by_token) for tile in _tiles(form)]
    fitting = [one for one in fitting if one.shared_bytes <= device.shared_bytes]
    # 16 rows that gather on their own need much memory: half as many rows fit the smallest GPU.
    return fitting or [Gemm(form, dtype, Tile(32, 2, 2, 1, 2), activation, by_token)]


def _tiles(form: Form) -> list[Tile]:
    """All that compile for a form, best first where they take as long."""
    wide = [Tile(128, 2, 4, 2, stages) for stages in (3, 2)] if _shared(form) and form.window else []
    return wide + [Tile(tokens, stages=stages) for tokens in (128, 64, 32) for stages in (3, 2)]


def _shared(form: Form) -> bool:
    """Whether two panels of a warp have the same columns; those of 2:4 are all there are."""
    return getattr(form.pattern, "v", 128) % 128 == 0
