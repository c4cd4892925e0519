"""What must hold after every pass beyond a sound graph: it can be stored, its facts hold, the origin is as it was."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sparsec import graph
from sparsec.errors import PassError

if TYPE_CHECKING:
    from torch import Tensor

    from sparsec.program import Program

Snapshot = dict[str, "tuple[Tensor, int]"]


def snapshot(program: Program) -> Snapshot:
    """The tensors that a clone will share, with torch's count of writes in place."""
    named = [*program.module.named_parameters(), *program.module.named_buffers()]
    return {name: (tensor, tensor._version) for name, tensor in named if not tensor.is_inference()}


def check(program: Program, shared: Snapshot) -> None:
    """Raise GraphError or PassError, worded as the end of `pass x: ...`, for the first thing that does not hold."""
    data = graph.to_json(program.module)  # what cannot be stored would fail only at save
    if not data["outputs"]:
        raise PassError("it leaves a graph that returns nothing")
    masks = [site.mask for site in program.sites if site.mask]
    if masks and "masked" not in program.facts:
        raise PassError(f"it leaves the mask {masks[0]} but not the fact masked; remove the mask, or establish masked")
    if "masked" in program.facts and not masks:
        raise PassError("it leaves the fact masked but no site with a mask; drop masked, or set Site.mask")
    if "selected" in program.facts and not any(site.selection for site in program.sites):
        raise PassError("it leaves the fact selected but no site with a selection; set Site.selection")
    for name, (tensor, version) in shared.items():
        if tensor._version != version:
            raise PassError(f"it wrote into {name} in place, which others hold; use Site.write, which replaces it")


def plain(value: Any) -> Any:
    """A pass's data as JSON can hold it: a report must not fail after hours of work. What has no word becomes text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)[:200]
