"""What a model.onnx says about itself, in its metadata_props: plain text or JSON, for people and for other tools.

sparsec.version   what wrote it
sparsec.patterns  {name of the weight: pattern}
sparsec.sites     {name: {pattern, shape (batch, rows, cols), kind, stored as, values, or why it is dense}}
sparsec.passes    what was done to the model, in order
sparsec.graph     SHA-256 of the program's graph, without its weights
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsec import _fx, graph
from sparsec.version import __version__

if TYPE_CHECKING:
    from sparsec.layout import Values
    from sparsec.program import Program
    from sparsec.sites import Site


def describe(program: Program, packed: Mapping[str, str], values: Values) -> dict[str, str]:
    """The entries of a program's file. `packed`: weight -> the operator that reads its tables; the others are dense."""
    sites = {site.name: _site(program, site, packed.get(site.name), values) for site in program.sites}
    content = {
        "sparsec.patterns": {site.name: str(site.pattern) for site in program.sites.sparse},
        "sparsec.sites": sites,
        "sparsec.passes": [entry["pass"] for entry in program.history],
    }
    text = json.dumps(graph.to_json(program.module), sort_keys=True)
    return {
        "sparsec.version": __version__,
        "sparsec.graph": hashlib.sha256(text.encode()).hexdigest(),
        **{key: json.dumps(value, separators=(",", ":")) for key, value in content.items()},
    }


def _site(program: Program, site: Site, operator: str | None, values: Values) -> dict[str, Any]:
    facts = {"pattern": str(site.pattern) if site.pattern else None, "shape": list(site.shape), "kind": site.kind}
    if not site.pattern:
        return facts | {"stored": "dense", "dense": site.excluded or "no pattern was asked for"}
    own = str(_fx.get_tensor(program.module, site.name).dtype).removeprefix("torch.")
    return facts | {"stored": operator or "dense, zeros in place", "values": own if values == "fp32" else values}
