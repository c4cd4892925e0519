"""Make the page: facts, tables and drawings put into a template that escapes every name. The file needs no network.

1. Text of the artifact reaches the page through autoescape only; what is marked safe is drawn or written here.
2. The page's policy lets nothing load, and one script run: the one whose hash it names.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import inspection, store
from sparsec.artifact import Artifact
from sparsec.errors import ArtifactError, SparsecError, UsageError
from sparsec.pipeline import Progress, no_progress
from sparsec.recipe import Recipe
from sparsec.report import bars, charts, drawing, facts, speeds, stored, table
from sparsec.report.before import weights
from sparsec.report.charts import Spread
from sparsec.report.drawing import Drawing
from sparsec.report.stored import Stored
from sparsec.show import megabytes

if TYPE_CHECKING:
    from torch import Tensor

NAME = "report.html"
_STEPS = 3
_HERE = Path(__file__).parent


def write(
    path: Path,
    out: Path | None = None,
    force: bool = False,
    before: bool = False,
    trust: bool = False,
    progress: Progress = no_progress,
) -> Path:
    """Write the page about the artifact at `path` to `out`, by default into the artifact. Returns where it is.

    `before`: load the model that the recipe names (`trust`: also from a .pt2 file), for histograms of before and after.
    Raises UsageError where `out` is there already (and not `force`) or cannot be written, or the model cannot be
    loaded; ArtifactError where the artifact is none or is damaged.
    """
    drawing.check_available()
    artifact = Artifact.open(path)
    out = out or artifact.root / NAME
    if out.exists() and not force and not out.is_dir():
        raise UsageError(f"{out} exists already; choose another -o, or add --force to replace it")
    store.check_file(out, "-o")
    facts.check(artifact.root, artifact.manifest)
    dense = weights(artifact.manifest, trust) if before else {}
    store.replace_file(out, render(artifact, dense, progress).encode())
    return out


def render(artifact: Artifact, before: Mapping[str, Tensor], progress: Progress = no_progress) -> str:
    """The page as HTML. Raises ArtifactError where the manifest does not hold what a page is made of."""
    from jinja2 import TemplateError

    progress("reading", 0, _STEPS)
    found = stored.read(artifact)
    progress("reading", 1, _STEPS)
    try:
        html: str = _template().render(_values(artifact, found, before, progress))
    except SparsecError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:  # plain data, not as written
        raise ArtifactError(
            f"{artifact.root}: manifest.json does not hold what `compile` writes ({type(error).__name__}: {error}); "
            "compile it again"
        ) from error
    progress("done", _STEPS, _STEPS)
    return html


def _values(
    artifact: Artifact, found: Mapping[str, Stored], before: Mapping[str, Tensor], progress: Progress
) -> dict[str, Any]:
    """Everything the template names."""
    manifest = artifact.manifest
    left, others = facts.dense_groups(manifest)
    columns = table.columns(manifest, found)
    whole = sum(file.stat().st_size for file in artifact.root.rglob("*") if file.is_file() and file.name != NAME)
    progress("drawing", 2, _STEPS)
    sites = facts.sparse(manifest)
    return {
        "model": manifest["source"].get("model") or manifest["recipe"].get("model") or artifact.root.name,
        "folder": artifact.root.name,
        "manifest": manifest,
        "patterns": sorted({f"{site['pattern']} = {site['words']}" for site in sites}),
        "summary": facts.summary(manifest),
        "tiles": facts.tiles(manifest, whole),
        "warnings": facts.warnings(manifest, inspection.findings(artifact.root, manifest)),
        "speed": _drawings(bars.speed(manifest.get("speed", ()))),
        "layer_speed": _drawings(bars.layer_speed(speeds.predicted(manifest))),
        "sizes": bars.sizes(_sizes(manifest)),
        "grids": [charts.grid(one) for one in table.grids(manifest, found)],
        "histograms": _drawings(_histograms(sites, found, before)),
        "before": bool(before),
        "trainings": _trainings(manifest),
        "columns": columns,
        "rows": table.rows(manifest, columns),
        "looks": [_look(site, found[site["name"]]) for site in sites if site["name"] in found],
        "dense": left,
        "others": others,
        "recipe": Recipe.from_data(manifest["recipe"]).to_yaml(),
    }


def _look(site: Mapping[str, Any], found: Stored) -> dict[str, Any]:
    batch, rows, cols = site["shape"]
    shape = f"{rows} x {cols}{f', the first of {batch} matrices' if batch > 1 else ''}"
    kept = "" if site["retained"] is None else f"; {site['retained']:.3f} of the summed score stays"
    about = (
        f"{shape}; {site['pattern']} = {site['words']}; {100 * found.density:.1f} % of the weights are not zero{kept}"
    )
    return {"name": site["name"], "about": about, "pictures": [dataclasses.asdict(one) for one in found.pictures]}


def _drawings(*made: Drawing | None) -> list[Drawing]:
    return [one for one in made if one]


def _sizes(manifest: facts.Manifest) -> list[tuple[str, int, int]]:
    sites = facts.sparse(manifest)
    dense, whole = sum(site["nbytes_dense"] for site in sites), manifest["nbytes"]["dense_model"]
    entries = [("dense model", dense, max(whole - dense, 0))]
    for name, entry in manifest["backends"].items():
        entries.append((name, entry["nbytes_sparse"], max(entry["nbytes"] - entry["nbytes_sparse"], 0)))
    return entries


def _histograms(
    sites: list[dict[str, Any]], found: Mapping[str, Stored], before: Mapping[str, Tensor]
) -> Drawing | None:
    after = {name: Spread(one.sample, one.density) for name, one in found.items()}
    dense = {name: Spread(stored.spaced(one), 1.0) for name, one in before.items()}
    return charts.histograms(_by_role(sites, after), _by_role(sites, dense))


def _by_role(sites: list[dict[str, Any]], spreads: Mapping[str, Spread]) -> dict[str, Spread]:
    import torch

    kinds: dict[str, list[Spread]] = {}
    for site in sites:
        if site["name"] in spreads:
            kinds.setdefault(site["role"], []).append(spreads[site["name"]])
    return {
        role: Spread(torch.cat([one.sample for one in each]), sum(one.share for one in each) / len(each))
        for role, each in kinds.items()
    }


def _trainings(manifest: facts.Manifest) -> list[dict[str, Any]]:
    """The passes that tell curves or figures, each with its drawing."""
    made = []
    for one in manifest.get("passes", ()):
        drawn = charts.curves(one.get("curves", {}), one.get("evaluation", ()))
        if drawn:
            made.append({"pass": one["pass"], "drawing": drawn, "about": one})
    return made


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    style, script = ((_HERE / f"report.{kind}").read_text() for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    safe: Callable[[str], Any] = Markup
    environment.globals.update(style=safe(style), script=safe(script), script_hash=digest, listed=facts.listed)
    environment.filters.update(megabytes=megabytes, svg=lambda one: safe(one.svg), slug=_slug)
    return environment.get_template("report.html.j2")


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")
