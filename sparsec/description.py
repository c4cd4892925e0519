"""What a manifest says about an artifact, and the model card that people read."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sparsec.backend import FP32_TOLERANCE
from sparsec.layout import table_bytes

if TYPE_CHECKING:
    from sparsec.program import Program
    from sparsec.quality import Quality
    from sparsec.recipe import Recipe
    from sparsec.sites import Site


def describe(program: Program, recipe: Recipe, measured: Quality, samples_are: str) -> dict[str, Any]:
    """The manifest's part that is known before anything is written."""
    graph = program.module.graph
    types = {node.target: node.meta["type"] for node in graph.nodes if node.op == "placeholder"}
    return {
        "source": program.origin,
        "recipe": recipe.model_dump(mode="json"),
        "inputs": [{"name": name, "type": types[name]} for name in program.inputs],
        "outputs": list(next(iter(reversed(graph.nodes))).args[0]),
        "dims": program.dims,
        "rows_per_item": _rows_per_item(program),
        "quality": {
            "cosine": measured.cosine,
            "relative_error": measured.relative_error,
            "output": measured.output,
            "samples": samples_are,
            "words": measured.words,
        },
        "sites": [_describe_site(site) for site in program.sites],
        "exclusions": [{"name": e.name, "role": e.role, "reason": e.reason} for e in program.sites.exclusions],
        "tolerance": FP32_TOLERANCE,
    }


def _describe_site(site: Site) -> dict[str, Any]:
    pattern = site.pattern
    return {
        "name": site.name,
        "role": site.role,
        "kind": site.kind,
        "shape": list(site.shape),
        "view": dataclasses.asdict(site.view),
        "pattern": str(pattern) if pattern else None,
        "words": pattern.words if pattern else None,
        "excluded": site.excluded,
        "retained": site.retained,
        "nbytes_dense": 4 * site.shape[0] * site.shape[1] * site.shape[2],
        "nbytes_sparse": table_bytes(pattern, site.shape) if pattern else None,
        "verdicts": {},
    }


def _rows_per_item(program: Program) -> int:
    """Rows a linear layer sees for one batch item, where the length is not dynamic: 197 for a ViT, 1 for an MLP."""
    nodes = {node.name: node for node in program.module.graph.nodes}
    rows = 1
    for site in program.sites:
        kind = nodes[site.users[0]].meta["type"]
        sizes = kind[kind.index("[") + 1 : -1].split(", ")[1:-1]
        if all(size.isdigit() for size in sizes):
            rows = max(rows, math.prod(map(int, sizes)))
    return rows


def card(manifest: dict[str, Any]) -> str:
    """A model card for people and hubs."""
    sparse = [site for site in manifest["sites"] if site["pattern"]]
    patterns = sorted({f"{site['pattern']} ({site['words']})" for site in sparse})
    model = manifest["source"].get("model", "a model")
    return "\n".join(
        [
            "---",
            f"base_model: {model}",
            "tags: [sparse, sparsec]",
            "---",
            f"# {model}, made sparse by sparsec {manifest['sparsec']}",
            "",
            f"- Patterns: {', '.join(patterns)}",
            f"- Sparse weights: {len(sparse)} of {len(manifest['sites'])} sites",
            f"- Quality: {manifest['quality']['words']}, on {manifest['quality']['samples']}",
            f"- Backends: {', '.join(manifest['backends'])}",
            "",
            "```python",
            "import sparsec",
            'module = sparsec.load("THIS FOLDER")  # needs neither transformers nor the model source',
            "```",
            "",
            "Prove it: `sparsec verify THIS_FOLDER`.",
            "Make it again: `sparsec compile --recipe THIS_FOLDER/manifest.json`.",
            "",
        ]
    )
