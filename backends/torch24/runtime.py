"""Run an artifact's graph on the GPU, its 2:4 layers on torch's semi_structured."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from sparsec import _fx, semi_structured
from sparsec.lowered import packed_calls, run_dense
from sparsec.program import bind

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from sparsec.lowered import PackedCall

log = logging.getLogger("sparsec")


def runs_sparse(call: PackedCall, name: semi_structured.Name) -> bool:
    """Whether the kernel runs a layer: a plain product, of a type and shape that it takes."""
    _, rows, cols = call.layout.shape
    return call.view is None and semi_structured.takes(name, call.layout.values.dtype, rows, cols)


def install(
    module: GraphModule, device: torch.device, name: semi_structured.Name, compress: semi_structured.Compress
) -> GraphModule:
    """Unpack every weight, move the graph to `device`, and compress the weights that the kernel `name` takes. In place.

    One weight at a time is there twice. Raises ArtifactError where a weight is not 2:4: torch would drop some of it.
    """
    calls = packed_calls(module)
    sparse = {f"{call.site}_dense" for call in calls if runs_sparse(call, name)}
    dense = {call.site for call in calls if f"{call.site}_dense" not in sparse}
    if dense:
        log.info("%d of the sparse weights run dense on this GPU, the first is %s", len(dense), min(dense))
    for call in calls:
        run_dense(module, call)
    _fx.prune_unused(module)
    _fx.move(module, device)
    semi_structured.compress_weights(module, sparse, compress)
    module.graph.lint()
    module.recompile()
    return module


class CudaModule(torch.nn.Module):
    """A loaded artifact: call it with the model's inputs, by name or position; returns the outputs by name.

    For inference. Inputs are copied to the GPU where they are not there; outputs stay there. `manifest` tells what it
    is: sites, patterns, quality, recipe.
    """

    def __init__(self, graph: GraphModule, manifest: dict[str, Any], device: torch.device) -> None:
        super().__init__()
        self.body, self.manifest, self.device = graph, manifest, device
        self.input_names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]

    @torch.no_grad()
    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        inputs = [value.to(self.device) for value in bind(self.input_names, args, kwargs)]
        outputs: dict[str, Tensor] = self.body(*inputs)
        return outputs
