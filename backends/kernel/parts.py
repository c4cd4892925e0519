"""What `sparsec.attach` puts into a model: the artifact's tensors by the model's names, and a layer for each kernel.

On a GPU `choice` says what runs a layer, as when the artifact is loaded there: panels, torch's 2:4 product, or dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.backend import Parts
from sparsec.backends.kernel.calls import has_kernel
from sparsec.backends.kernel.cpu import int8, library, stream
from sparsec.backends.kernel.cpu.layer import FLOAT, INT8, Product, SparseLinear
from sparsec.backends.kernel.cuda import ahead
from sparsec.backends.kernel.cuda.destination import Destination
from sparsec.backends.kernel.cuda.install import compressed_of, panels_of, verdict
from sparsec.backends.kernel.cuda.linear import panel_linear
from sparsec.backends.kernel.cuda.panels import unpack
from sparsec.backends.kernel.cuda.sharing import laid_out
from sparsec.errors import ArtifactError
from sparsec.layout import decompress
from sparsec.lowered import PackedCall, packed_calls
from sparsec.pattern import NM, SharedColumns
from sparsec.program import read_graph
from sparsec.semi_structured import semi_structured_linear
from sparsec.view import WeightView

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.fx import GraphModule


_UNROUNDED = (
    "its values are int8 and run dense here, with activations that are not rounded to int8, as sparsec's int8 kernels "
    'do it on the CPU; for what those compute on a GPU: sparsec.load(path, device="cuda")'
)
MakeLayer = Callable[[PackedCall, WeightView], "Callable[[Any], Any] | str"]
"""A layer that is still to be given its bias, or the reason why there is none."""


def read_parts(
    folder: Path,
    manifest: dict[str, Any],
    make: MakeLayer | None = None,
    share: Callable[[Any], Iterable[Any]] | None = None,
) -> Parts:
    """The parts of a checked folder; a weight that no kernel runs there is unpacked, with the reason.

    `make`: makes layers; default: those of this machine's CPU. `share`: as in `Parts`.
    """
    module, make = read_graph(folder), make or on_cpu
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sites = {site["name"]: site for site in manifest["sites"]}
    parts = Parts(tensors, share=share)
    try:
        _fill(parts, module, make, sites)
    except BaseException:  # its traceback keeps the parts
        parts.layers.clear()
        raise
    return parts


def _fill(parts: Parts, module: GraphModule, make: MakeLayer, sites: dict[str, dict[str, Any]]) -> None:
    tensors = parts.tensors
    for call in {call.site: call for call in packed_calls(module)}.values():  # a shared weight is called twice
        for table in call.layout.tensors():
            del tensors[f"{call.site}_{table}"]
        view = _view(call, sites.get(call.site, {}))
        made = make(call, view)
        if isinstance(made, str):
            tensors[call.site] = view.to_parameter(decompress(call.layout, call.dtype))
            parts.dense[call.site] = made or sites[call.site]["verdicts"]["kernel"]["reason"]
            continue
        parts.layers[call.site], parts.views[call.site], parts.dtypes[call.site] = made, view, call.dtype


def on_cpu(call: PackedCall, view: WeightView) -> Callable[[Any], Any] | str:
    """A layer on the CPU kernels; an empty reason is the one that was found when the artifact was compiled."""
    if not has_kernel(call):
        return ""
    if library.level() is None:
        return library.unavailable_reason() or ""
    if call.layout.stored == "int8":
        return partial(SparseLinear, INT8, int8.pack(call.layout), view)
    return partial(SparseLinear, FLOAT, stream.pack(call.layout), view)


def on_gpu(there: Destination) -> MakeLayer:
    """Makes layers on a GPU; see `install_on`."""

    def make(call: PackedCall, view: WeightView) -> Callable[[Any], Any] | str:
        found = verdict(call, there)
        if found.kernel == "panels":
            packed = panels_of(call, there.device)
            ahead.load([ahead.layer_of(call)], there.device)
            return partial(SparseLinear, _on_panels(call), packed, view, dtype=call.dtype)
        if found.kernel == "cuSPARSELt" and there.compress is not None:
            packed = compressed_of(call, there.device, there.compress)
            return partial(SparseLinear, _TWO_OF_FOUR, packed, view, dtype=call.dtype)
        return _UNROUNDED if found.kernel == "reference" else found.reason

    return make


def _on_panels(call: PackedCall) -> Product:
    pattern, (_, rows, cols) = call.layout.pattern, call.layout.shape
    assert isinstance(pattern, (NM, SharedColumns))
    unpacked = partial(_of_panels, pattern=pattern, rows=rows, cols=cols)
    return Product(partial(_run_panels, pattern=str(pattern), dtype=call.dtype), unpacked)


def _run_panels(
    x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, pattern: str, dtype: torch.dtype
) -> Tensor:
    if x.dtype != dtype:  # the kernel would read the bits of one type as the other's
        raise TypeError(f"the layer's panels hold {dtype}, and x is {x.dtype}: convert x, or run without autocast")
    return panel_linear(laid_out(x), panels, bias, out_features, pattern)


def _of_panels(panels: Tensor, dtype: torch.dtype, pattern: NM | SharedColumns, rows: int, cols: int) -> Tensor:
    return decompress(unpack(panels, pattern, rows, cols, dtype), dtype)


def _run_compressed(x: Tensor, weight: Tensor, bias: Tensor | None, _: int) -> Tensor:
    return semi_structured_linear(x, weight, bias)


def _of_compressed(weight: Tensor, _: torch.dtype) -> Tensor:
    return weight.to_dense()[None]


_TWO_OF_FOUR = Product(_run_compressed, _of_compressed)


def _view(call: PackedCall, site: dict[str, Any]) -> WeightView:
    """How the model holds the weight, which the tables do not tell: a Conv1D's lies as (in, out)."""
    try:
        stored = dict(site["view"])
        view = WeightView(tuple(stored.pop("axes")), tuple(stored.pop("parameter")), **stored)
        fits = view.shape == call.layout.shape
    except (KeyError, TypeError, IndexError):
        fits = False
    if not fits:
        raise ArtifactError(f"manifest.json does not say how {call.site} lies in its model; compile the model again")
    return view
