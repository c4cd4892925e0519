"""What a manifest says about an artifact, and the model card that people read."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from sparsec import _fx
from sparsec.backend import BF16_TOLERANCE, INT8_MARGIN, tolerance_of
from sparsec.intersection import Intersection
from sparsec.layout import VALUE_BYTES, Values, table_bytes
from sparsec.sites import PRUNED_FROM

if TYPE_CHECKING:
    import torch

    from sparsec.program import Program
    from sparsec.quality import Quality
    from sparsec.recipe import Recipe
    from sparsec.sites import Site


def describe(program: Program, dense: Program, recipe: Recipe, measured: Quality, samples_are: str) -> dict[str, Any]:
    """The manifest's part that is known before anything is written. `dense`: the program before its passes."""
    sites = [_describe_site(program, site, recipe.values) for site in program.sites]
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
        "sites": sites,
        "exclusions": [{"name": e.name, "role": e.role, "reason": e.reason} for e in program.sites.exclusions],
        "values": {"type": recipe.values},
        "tolerance": tolerance_of(program),
        **_describe_intersections(program, dense, {site["name"]: site for site in sites}),
        **_describe_pruned_before(program, dense, recipe),
    }


def _describe_intersections(program: Program, dense: Program, sites: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a second pattern costs: shares of the summed magnitude of the dense weights, whatever score was used.

    `intersections`: pattern -> sites, what its first pattern keeps alone, what both keep. Each site gets its own shares
    under the same key.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}
    for site in program.sites.sparse:
        if isinstance(site.pattern, Intersection):
            size = dense.sites[site.name].read(dense.module).abs().float()
            sums = float(size.sum()), *site.pattern.kept_of_score(size)
            found.setdefault(str(site.pattern), []).append(sums)
            sites[site.name]["intersection"] = _shares(*sums)
    every = {text: {"sites": len(each), **_shares(*map(sum, zip(*each, strict=True)))} for text, each in found.items()}
    return {"intersections": every} if every else {}


def _describe_pruned_before(program: Program, dense: Program, recipe: Recipe) -> dict[str, str]:
    """Words where weights that came with zeros were pruned anew: whoever pruned them may have meant `adopt`."""
    if "adopt" in recipe.passes:
        return {}
    anew, came = 0, 0
    for site in program.sites.sparse:
        weight = dense.sites[site.name].read(dense.module)
        if weight.count_nonzero() <= (1 - PRUNED_FROM) * weight.numel():
            came += 1
            anew += not site.read(program.module).equal(weight)
    words = (
        f"{came} sites had zeros when they came, and {anew} of them {'was' if anew == 1 else 'were'} changed here; "
        "to keep what another tool pruned: --passes adopt"
    )
    return {"pruned_before": words} if anew else {}


def _shares(total: float, alone: float, together: float) -> dict[str, float]:
    return {"alone": alone / total if total else 1.0, "together": together / total if total else 1.0}


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


def task_words(task: dict[str, Any]) -> str:
    """`accuracy 0.912 (dense 0.921) on 872 rows of dev.tsv`, from the manifest's part on the task."""
    name = task["metric"]
    beside = f"dense {task['dense'][name]:.3f}" if "dense" in task else "the dense model's head is untrained"
    return f"{name} {task['sparse'][name]:.3f} ({beside}) on {task['data']}"


def trained_on(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What the manifest says of each data set that was trained on."""
    return [manifest["training"], *manifest["training"].get("also", ())] if "training" in manifest else []


def describe_values(values: Values, loss: Quality, difference: float, least: float) -> dict[str, Any]:
    """The manifest's part on what rounding the stored weights did, measured on the artifact against the masked graph.

    `difference`: the largest of any output, relative to its largest value. Verification allows what `tolerance` says:
    for int8 no bound holds for every model, so it is twice what was measured on the calibration samples, and not below
    `least`, what the model's own type allows.
    """
    tolerance = BF16_TOLERANCE if values == "bf16" else max(INT8_MARGIN * difference, least)
    loses = {"cosine": loss.cosine, "relative_error": loss.relative_error, "largest_difference": difference}
    return {"values": {"type": values, **loses}, "tolerance": tolerance}


def _describe_site(program: Program, site: Site, values: Values) -> dict[str, Any]:
    pattern, dtype = site.pattern, _fx.get_tensor(program.module, site.name).dtype
    value_bytes = dtype.itemsize if values == "fp32" else VALUE_BYTES[values]  # fp32: not rounded further
    moved = site.selection is not None and site.selection.rows is not None
    return {
        "name": site.name,
        "role": site.role,
        "kind": site.kind,
        "shape": list(site.shape),
        "view": dataclasses.asdict(site.view),
        "pattern": str(pattern) if pattern else None,
        "words": pattern.words if pattern else None,
        **({"moved": True} if moved else {}),  # the rows of a strip are no neighbours
        "excluded": site.excluded,
        "retained": site.retained,
        "values": _stored(dtype, values) if pattern else None,
        "nbytes_dense": dtype.itemsize * site.shape[0] * site.shape[1] * site.shape[2],
        "nbytes_sparse": table_bytes(pattern, site.shape, value_bytes, moved) if pattern else None,
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
    first = next(iter(manifest["backends"].values()))
    trust = ", trust=True" if first.get("needs_trust") else ""  # else it is not needed
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
            f"- Quality: {manifest['quality']['words']}; on {manifest['quality']['samples']}",
            *([f"- Task: {task_words(manifest['quality']['task'])}"] if "task" in manifest["quality"] else []),
            *(f"- Trained on {one['words']}" for one in trained_on(manifest)),
            f"- Backends: {', '.join(manifest['backends'])}",
            *(f"- {name}: {entry['note']}" for name, entry in manifest["backends"].items() if "note" in entry),
            "",
            "```python",
            "import sparsec",
            f'module = sparsec.load("THIS FOLDER"{trust})  # needs neither transformers nor the model source',
            "```",
            "",
            "Prove it: `sparsec verify THIS_FOLDER`.",
            "Make it again: `sparsec compile --recipe THIS_FOLDER/manifest.json`.",
            "",
        ]
    )
