"""What `sparsec.attach` puts into a model: the artifact's tensors by the model's names, and a layer for each kernel."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from sparsec.backend import Parts
from sparsec.backends.kernel.calls import has_kernel
from sparsec.backends.kernel.cpu import library
from sparsec.backends.kernel.cpu.layer import FLOAT, INT8, SparseLinear
from sparsec.errors import ArtifactError
from sparsec.layout import decompress
from sparsec.lowered import PackedCall, packed_calls
from sparsec.program import read_graph
from sparsec.view import WeightView


def read_parts(folder: Path, manifest: dict[str, Any]) -> Parts:
    """The parts of a checked folder; a weight that no kernel runs on this machine is unpacked, with the reason."""
    module = read_graph(folder)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    sites = {site["name"]: site for site in manifest["sites"]}
    parts = Parts(tensors)
    for call in {call.site: call for call in packed_calls(module)}.values():  # a shared weight is called twice
        for table in call.layout.tensors():
            del tensors[f"{call.site}_{table}"]
        view = _view(call, sites.get(call.site, {}))
        if has_kernel(call) and library.level() is not None:
            product = INT8 if call.layout.stored == "int8" else FLOAT
            parts.layers[call.site] = partial(SparseLinear, product, product.pack(call.layout), view)
            parts.views[call.site] = view
            continue
        tensors[call.site] = view.to_parameter(decompress(call.layout, call.dtype))
        verdict = sites[call.site]["verdicts"]["kernel"]["reason"]
        parts.dense[call.site] = library.unavailable_reason() or verdict if has_kernel(call) else verdict
    return parts


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
