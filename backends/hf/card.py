"""The model card of a Hugging Face folder: README.md, with the front matter that hubs read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from sparsec.description import task_words, trained_on

_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets", "base_model")
_FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def inherited(origin: Path) -> dict[str, Any]:
    """What the card in the origin's folder says that holds for the sparse model too; nothing where it has none."""
    import yaml

    try:
        found = _FRONT_MATTER.match((origin / "README.md").read_text())
        data = yaml.safe_load(found[1]) if found else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    return {key: data[key] for key in _INHERITED if isinstance(data.get(key), (str, list))}


def card(manifest: dict[str, Any]) -> str:
    """The text of the card, from an artifact's manifest."""
    import transformers
    import yaml

    facts = manifest["backends"]["hf"]
    sparse = [site for site in manifest["sites"] if site["pattern"]]
    patterns = {site["pattern"]: site["words"] for site in sparse}
    model = str(manifest["source"].get("model", "a model"))
    front = {"library_name": "transformers", **facts["card"]}
    if _HUB_ID.fullmatch(model) and not Path(model).exists():
        front["base_model"] = model
    else:
        model = Path(model).name  # where it lay is nobody's business
    front["tags"] = ["sparse", "sparsec", *patterns]
    recipe = {key: value for key, value in manifest["recipe"].items() if value not in ("", [], False)}
    recipe.pop("model")  # it is given beside the recipe
    zeros = 1 - sum(_kept(site) for site in sparse) / max(sum(map(_size, sparse)), 1)
    versions = f"sparsec {manifest['sparsec']}, torch {manifest['torch']}, transformers {transformers.__version__}"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {Path(model).name}, made sparse",
        "",
        f"{len(sparse)} of {len(manifest['sites'])} weight matrices of {model} follow a sparsity pattern exactly; "
        f"{100 * zeros:.3g} % of their weights are zero.",
        "",
        *(f"- {text}: {words}" for text, words in patterns.items()),
        "",
        *_table(sparse),
        "",
        "## Quality",
        "",
        *_quality(manifest),
        "",
        "## Use",
        "",
        "```python",
        f"from transformers import {facts['class']}",
        "",
        f'model = {facts["class"]}.from_pretrained("THIS_FOLDER")',
        "```",
        "",
        "The zeros stand in dense weights, and transformers multiplies them too. For kernels that skip them: "
        "`sparsec compile THIS_FOLDER --passes adopt`.",
        "",
        "## How it was made",
        "",
        f"With {versions}:",
        "",
        "```",
        f"sparsec compile {model} --recipe recipe.yaml",
        "```",
        "",
        "where `recipe.yaml` is",
        "",
        "```yaml",
        yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _size(site: dict[str, Any]) -> int:
    batch, rows, cols = site["shape"]
    return int(batch * rows * cols)


def _kept(site: dict[str, Any]) -> float:
    """Weights that the pattern keeps; of two patterns at once, the most that they may."""
    from sparsec.pattern import Pattern

    return Pattern.parse(site["pattern"]).density * _size(site)


def _table(sparse: list[dict[str, Any]]) -> list[str]:
    """Sites of the same role, shape and pattern are one row."""
    same = Counter((site["role"], tuple(site["shape"]), site["pattern"]) for site in sparse)
    head = ["| weights | how many | shape | pattern |", "|---|---|---|---|"]
    return head + [
        f"| {role} | {count} | {' x '.join(map(str, shape if shape[0] > 1 else shape[1:]))} | {pattern} |"
        for (role, shape, pattern), count in same.items()
    ]


def _quality(manifest: dict[str, Any]) -> list[str]:
    quality = manifest["quality"]
    lines = [
        f"- {quality['words']}, on {quality['samples']}",
        *(f"- Trained on {o['words']}" for o in trained_on(manifest)),
    ]
    task = quality.get("task")
    if not task:
        return [*lines, "- No task was judged; compile with --eval DATA to have its figures here."]
    lines += [f"- {task_words(task)}", "", "| metric | dense | sparse |", "|---|---|---|"]
    dense = task.get("dense", {})
    before = {name: f"{dense[name]:.4f}" if name in dense else "untrained head" for name in task["sparse"]}
    return lines + [f"| {name} | {before[name]} | {value:.4f} |" for name, value in task["sparse"].items()]
