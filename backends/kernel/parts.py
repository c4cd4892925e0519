"""What `sparsec.attach` puts into a model: the artifact's tensors by the model's names, and a layer for each kernel.

On a GPU the layers run on panels, or dense where that is predicted faster; torch's 2:4 product has no layer here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec.backend import Parts
from sparsec.backends.kernel.calls import has_kernel
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.layer import FLOAT, INT8, Product, SparseLinear
from sparsec.backends.kernel.cuda.install import panels_of, verdict
from sparsec.backends.kernel.cuda.linear import panel_linear
from sparsec.backends.kernel.cuda.panels import pack, unpack
from sparsec.errors import ArtifactError
from sparsec.layout import decompress
from sparsec.lowered import PackedCall, packed_calls
from sparsec.pattern import NM, SharedColumns
from sparsec.program import read_graph
from sparsec.view import WeightView

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsec.backends.kernel.cuda.ceilings import Ceilings
    from sparsec.cost import TokenRange


MakeLayer = Callable[[PackedCall, WeightView], "Callable[[Any], Any] | str"]
"""A layer that is still to be given its bias, or the reason why there is none."""


def read_parts(folder: Path, manifest: dict[str, Any], make: MakeLayer | None = None) -> Parts:
    """The parts of a checked folder; a weight that no kernel runs there is unpacked, with the reason.

    `make`: makes layers; default: those of this machine's CPU.
    """
    module, make = read_graph(folder), make or on_cpu
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sites = {site["name"]: site for site in manifest["sites"]}
    parts = Parts(tensors)
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
    return parts


def on_cpu(call: PackedCall, view: WeightView) -> Callable[[Any], Any] | str:
    """A layer on the CPU kernels; an empty reason is the one that was found when the artifact was compiled."""
    if not has_kernel(call):
        return ""
    if library.level() is None:
        return library.unavailable_reason() or ""
    product = INT8 if call.layout.stored == "int8" else FLOAT
    return partial(SparseLinear, product, product.pack(call.layout), view)


def on_gpu(device: torch.device, table: Ceilings | None, tokens: TokenRange | None) -> MakeLayer:
    """Makes layers on panels, on a GPU; see `install_on`."""

    def make(call: PackedCall, view: WeightView) -> Callable[[Any], Any] | str:
        found = verdict(call, table, tokens, two_of_four=False)
        if found.kernel != "panels":
            return found.reason
        pattern, (_, rows, cols), dtype = call.layout.pattern, call.layout.shape, call.dtype
        assert isinstance(pattern, (NM, SharedColumns))

        def run(x: Tensor, panels: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
            return panel_linear(x, panels, bias, out_features, str(pattern))

        unpacked = partial(unpack, pattern=pattern, rows=rows, cols=cols, dtype=dtype)
        product = Product(partial(pack, dtype=dtype), run, unpacked)
        return partial(SparseLinear, product, panels_of(call, device), view, dtype=dtype)

    return make


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
