"""What a manifest says about an artifact, and the model card that people read."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.backend import BF16_TOLERANCE, FP32_TOLERANCE, INT8_MARGIN, tolerance_of
from sparsec.layout import VALUE_BYTES, Values, table_bytes

if TYPE_CHECKING:
    import torch

    from sparsec.program import Program
    from sparsec.quality import Quality
    from sparsec.recipe import Recipe
    from sparsec.sites import Site


def describe(program: Program, recipe: Recipe, measured: Quality, samples_are: str) -> dict[str, Any]:
    """The manifest's part that is known before anything is written."""
    graph = program.module.graph
    types = {node.target: node.meta["type"] for node in graph.nodes if node.op == "placeholder"}
    return {
        "source": {key: value for key, value in program.origin.items() if key != "folder"},  # the maker's own affair
        "recipe": recipe.model_dump(mode="json"),
        "inputs": [{"name": name, "type": types[name]} for name in program.inputs],
        "outputs": list(next(iter(reversed(graph.nodes))).args[0]),
        "dims": program.dims,
        "rows_per_item": rows_per_item(program),
        "quality": describe_quality(measured, samples_are),
        "sites": [_describe_site(program, site, recipe.values) for site in program.sites],
        "exclusions": [{"name": e.name, "role": e.role, "reason": e.reason} for e in program.sites.exclusions],
        "values": {"type": recipe.values},
        "tolerance": tolerance_of(program),
    }


def describe_quality(measured: Quality, samples_are: str) -> dict[str, Any]:
    """The manifest's part on the distance to the dense original."""
    return {
        "cosine": measured.cosine,
        "relative_error": measured.relative_error,
        "embedding_cosine": measured.embedding,
        "output": measured.output,
        "samples": samples_are,
        "words": measured.words,
    }


def describe_values(values: Values, loss: Quality, difference: float) -> dict[str, Any]:
    """The manifest's part on what rounding the stored weights did, measured on the artifact against the masked graph.

    `difference`: the largest of any output, relative to its largest value. Verification allows what `tolerance` says:
    for int8 no bound holds for every model, so it is twice what was measured on the calibration samples.
    """
    tolerance = BF16_TOLERANCE if values == "bf16" else max(INT8_MARGIN * difference, FP32_TOLERANCE)
    loses = {"cosine": loss.cosine, "relative_error": loss.relative_error, "largest_difference": difference}
    return {"values": {"type": values, **loses}, "tolerance": tolerance}


def _describe_site(program: Program, site: Site, values: Values) -> dict[str, Any]:
    pattern, dtype = site.pattern, _fx.get_tensor(program.module, site.name).dtype
    value_bytes = dtype.itemsize if values == "fp32" else VALUE_BYTES[values]  # fp32: not rounded further
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
        "values": _stored(dtype, values) if pattern else None,
        "nbytes_dense": dtype.itemsize * site.shape[0] * site.shape[1] * site.shape[2],
        "nbytes_sparse": table_bytes(pattern, site.shape, value_bytes) if pattern else None,
        "verdicts": {},
    }


def _stored(dtype: torch.dtype, values: Values) -> str:
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    name = str(dtype).removeprefix("torch.")
    return names.get(name, name) if values == "fp32" else values


def rows_per_item(program: Program) -> int:
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
