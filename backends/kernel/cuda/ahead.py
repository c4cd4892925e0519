"""Compile and load the kernels of layers before they run: no launch waits for it, and CUDA graphs capture any of them.

1. A layer's kernels are all that `variants.every` has for its form, type and activation, whatever its number of tokens.
2. What layers share is compiled once; the rest is compiled in parallel, into the cache, and loaded from there.
3. For a GPU that need not be here no layer is left out: its table may differ from ours, and so what runs dense there.
   Nor is a way to lie: results lie as their readers want them, which depends on what runs sparse.
4. A GPU of which only the architecture is known may have any number of multiprocessors.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import torch

from sparsec import _fx
from sparsec.backends.kernel.cuda import ceilings
from sparsec.backends.kernel.cuda.build import cubin
from sparsec.backends.kernel.cuda.driver import CudaGpu, Variant, gpu, program_of
from sparsec.backends.kernel.cuda.linear import panel_linear
from sparsec.backends.kernel.cuda.panels import Form, form_of_layout
from sparsec.backends.kernel.cuda.variants import Activation, Device, every
from sparsec.errors import UsageError
from sparsec.pipeline import Progress, no_progress

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from sparsec.lowered import PackedCall

log = logging.getLogger("sparsec")
_PATIENCE = 2.0  # seconds after which loading says what it waits for
# Shared memory of a thread block, at most, by compute capability.
_SHARED = {
    "sm_80": 166912, "sm_86": 101376, "sm_87": 166912, "sm_89": 101376, "sm_90a": 232448, "sm_100a": 232448,
    "sm_103a": 232448, "sm_110a": 232448, "sm_120a": 101376, "sm_121a": 101376,
}  # fmt: skip
_FEWEST, _MOST = 1, 1 << 20  # multiprocessors: `variants` asks whether there are more than some number


@dataclass(frozen=True)
class Layer:
    """What a layer asks of a GPU."""

    form: Form
    dtype: torch.dtype
    activation: Activation = "none"
    by_token: bool = True


def layer_of(call: PackedCall) -> Layer:
    """The layer of a call that has panels, without what stands behind it in a graph."""
    return Layer(form_of_layout(call.layout), call.dtype)


def layers_in(module: GraphModule, plain: dict[str, Layer]) -> set[Layer]:
    """The layers that a graph runs. `plain`: by the name of their panels, as `layer_of` has them."""
    found = set()
    for node in _fx.calls(module.graph, panel_linear):
        _, panels, _, _, _, *behind = cast("tuple[Any, ...]", node.args)
        given: dict[str, Any] = dict(zip(("activation", "by_token"), behind, strict=False))
        found.add(dataclasses.replace(plain[str(panels.target)], **given))
    return found


def anywhere(layer: Layer, activation: Activation) -> set[Layer]:
    """Rule 3: in a graph, with the activation behind it, and in a model, without."""
    return {
        dataclasses.replace(layer, activation=one, by_token=by_token)
        for one in ("none", activation)
        for by_token in (True, False)
    }


def variants_of(layers: Iterable[Layer], devices: Iterable[Device]) -> set[Variant]:
    """Rule 1, for devices of one architecture."""
    wanted = {(one, device) for one in layers for device in devices}
    return {
        variant
        for one, device in wanted
        for variant in every(one.form, one.dtype, device, one.activation, one.by_token)
    }


def compile_all(variants: Iterable[Variant], arch: str, progress: Progress = no_progress) -> int:
    """Rule 2, without a GPU; how many kernels there are. Raises UsageError where one cannot be compiled."""
    different = {program_of(one): one for one in variants}
    stop = Event()

    def compile_one(one: Variant) -> None:
        if stop.is_set():
            return
        try:
            cubin(one.kernel, one.macros, arch)
        except BaseException:
            stop.set()  # by the thread that failed: nobody else knows before it begins the next
            raise

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        running = [pool.submit(compile_one, one) for one in different.values()]
        try:
            for done, one in enumerate(as_completed(running)):
                one.result()
                progress("compiling kernels", done + 1, len(running))
        finally:
            stop.set()  # an interrupt too
    return len(different)


def load(layers: Iterable[Layer], device: torch.device) -> None:
    """Compile and load all that layers may launch on a GPU of this machine; says so where that takes long."""
    on = _gpu(device)
    if on is None:
        return
    begun, said = time.monotonic(), False

    def say(task: str, done: int, total: int) -> None:
        nonlocal said
        if not said and done < total and time.monotonic() - begun > _PATIENCE:
            said = True
            log.warning("compiling %d GPU kernels for %s, once; %d are done", total, on.device.arch, done)

    wanted = variants_of(layers, [on.device])
    compile_all(wanted, on.device.arch, say)
    on.load(wanted)


def devices_named(device: str) -> tuple[Device, ...]:
    """The GPUs that a name stands for: `h200`; `sm_80` (rule 4); `cuda`, `cuda:1`. Raises UsageError for another."""
    if known := ceilings.SHIPPED.get(device.lower()):
        return (known.device,)
    name = next((one for one in _SHARED if device.lower() in (one, one.removesuffix("a"))), None)
    if name is not None:
        return tuple(Device(name, count, _SHARED[name]) for count in (_FEWEST, _MOST))
    if not device.startswith("cuda"):
        raise UsageError(
            f"device {device!r} is not known; expected one of {', '.join((*ceilings.SHIPPED, *_SHARED))}, or cuda, "
            "this machine's"
        )
    if not torch.cuda.is_available():
        raise UsageError(
            f"{device}: no CUDA GPU was found; name the GPU that the kernels are for, such as h200 or sm_80"
        )
    return (ceilings.device_of(ceilings.index_of(device)),)


def _gpu(device: torch.device) -> CudaGpu | None:
    """None for the CPU, which stands in for a GPU in tests."""
    return gpu(device.index) if device.type == "cuda" else None
