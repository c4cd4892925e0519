"""What a manifest says, in the words and figures that the page shows. Everything here is plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sparsec.benchmark import ratios, size_of
from sparsec.description import task_words, trained_on
from sparsec.errors import ArtifactError
from sparsec.quality import FLOOR
from sparsec.show import megabytes

Manifest = Mapping[str, Any]
Tone = str
"""`good`, `warn` or `bad`: how a figure or a sentence is to be taken."""
_NUMBER = (int, float)
_SITE = {
    "name": str, "role": str, "shape": list, "pattern": (str, type(None)), "words": (str, type(None)),
    "excluded": (str, type(None)), "retained": (*_NUMBER, type(None)), "nbytes_dense": _NUMBER,
    "nbytes_sparse": (*_NUMBER, type(None)), "verdicts": dict,
}  # fmt: skip
_LISTED = 6  # names in a sentence


class Tile(NamedTuple):
    """A figure at the top of the page."""

    label: str
    value: str
    words: str
    tone: Tone = ""


class Said(NamedTuple):
    """A sentence, and how it is to be taken."""

    tone: Tone
    text: str


class Group(NamedTuple):
    """Weights that are not sparse for one reason."""

    reason: str
    role: str
    names: tuple[str, ...]


def check(root: Path, manifest: Manifest) -> None:
    """Raise ArtifactError naming what the manifest does not say of a site, or of the whole."""
    for key, kind in (("quality", dict), ("nbytes", dict), ("exclusions", list), ("source", dict), ("values", dict)):
        if not isinstance(manifest.get(key), kind):
            raise ArtifactError(f"{root}: manifest.json has no {key}; expected an artifact that `compile` wrote")
    for place, site in enumerate(manifest["sites"]):
        name = site.get("name") if isinstance(site, dict) else None
        for key, kinds in _SITE.items():
            if not isinstance(site, dict) or key not in site or not isinstance(site[key], kinds):  # type: ignore[arg-type]
                found = repr(site[key]) if isinstance(site, dict) and key in site else "nothing"
                raise ArtifactError(
                    f"{root}: manifest.json, site {place} ({name or 'without a name'}): found {found} as {key}; the "
                    "data of a site are missing, so there is nothing to report: compile it again"
                )


def sparse(manifest: Manifest) -> list[dict[str, Any]]:
    """The sites with a pattern."""
    return [site for site in manifest["sites"] if site["pattern"]]


def tiles(manifest: Manifest, folder_bytes: int) -> list[Tile]:
    """The figures a reader wants first."""
    sites, found = manifest["sites"], sparse(manifest)
    whole = len(found) == len(sites)
    made = [
        Tile("Sites sparse", f"{len(found)} of {len(sites)}", "all of them" if whole else "the others have a reason")
    ]
    dense = sum(site["nbytes_dense"] for site in found)
    packed = sum(site["nbytes_sparse"] or 0 for site in found)
    if dense:
        made.append(
            Tile("Sparse weights", f"{packed / dense:.2f}x", f"{megabytes(packed)} of {megabytes(dense)} dense")
        )
    made.append(Tile("Folder", megabytes(folder_bytes), f"dense model {megabytes(manifest['nbytes']['dense_model'])}"))
    quality = manifest["quality"]
    if quality.get("cosine") is not None:
        words = f"with the dense outputs ({quality['output']})"
        made.append(Tile("Cosine", f"{quality['cosine']:.3f}", words, verdict(manifest).tone))
    if "task" in quality:
        task = quality["task"]
        beside = f"dense {task['dense'][task['metric']]:.3f}" if "dense" in task else "new head: no dense figure"
        made.append(Tile(task["metric"].capitalize(), f"{task['sparse'][task['metric']]:.3f}", beside))
    if speeds := [one for row in manifest.get("speed", ()) for one in ratios(row).values()]:
        low, high = min(speeds), max(speeds)
        tone = "good" if low >= 1 else "bad" if high < 1 else "warn"
        made.append(Tile("Speed", f"{low:.2f} - {high:.2f}x", "of the dense model, measured", tone))
    return made


def summary(manifest: Manifest) -> str:
    """`36 of 37 sites sparse, the others because ...`."""
    sites, left = manifest["sites"], dense_groups(manifest)[0]
    text = f"{len(sparse(manifest))} of {len(sites)} sites are sparse"
    because = [
        f"{listed([name.removesuffix('.weight') for name in group.names])} dense: {group.reason}" for group in left
    ]
    return "; ".join([text, *because]) + "."


def verdict(manifest: Manifest) -> Said:
    """Whether the model can be used as it is."""
    quality = manifest["quality"]
    words, cosine = str(quality["words"]), quality.get("cosine")
    tone = "good" if cosine is not None and cosine >= FLOOR else "bad" if words.startswith("needs training") else "warn"
    return Said(tone, words[:1].upper() + words[1:])


def warnings(manifest: Manifest, findings: Iterable[str]) -> list[Said]:
    """What a user should know before using it, worst first."""
    quality, said = manifest["quality"], [verdict(manifest)]
    if "task" in quality:
        said.append(Said("good" if "dense" in quality["task"] else "warn", f"Task: {task_words(quality['task'])}."))
    said += [Said("warn", one["remark"]) for one in trained_on(dict(manifest)) if "remark" in one]
    if "uncalibrated" in manifest:
        said.append(Said("warn", f"Pruned by magnitude, without data: {manifest['uncalibrated']}."))
    said += [Said("warn", f"{manifest['pruned_before']}.")] if "pruned_before" in manifest else []
    said += [Said("warn", text) for text in _not_fast(manifest)]
    for row in manifest.get("speed", ()):
        for name, ratio in ratios(row).items():
            if ratio < 1:
                said.append(Said("warn", f"At {size_of(row)} it is slower than {name}: {ratio:.2f} times as fast."))
    stored = manifest["values"]
    if stored.get("type", "fp32") != "fp32" and "relative_error" in stored:
        error, most = stored["relative_error"], stored["largest_difference"]
        text = f"Values are stored as {stored['type']}: outputs differ from the masked fp32 model's by {error:.4f}"
        said.append(Said("warn", f"{text} (relative error), at most {most:.1e}."))
    for name, entry in manifest["backends"].items():
        said += [Said("warn", f"{name}: {entry['note']}")] if "note" in entry else []
        said += [Said("warn", f"{name} was not run: {entry['not_run']}")] if "not_run" in entry else []
    open_sites = [site["name"] for site in manifest["sites"] if not site["pattern"] and not site["excluded"]]
    if open_sites:
        said.append(Said("warn", f"{listed(open_sites)} dense, because no pattern was asked for."))
    said += [Said("warn", text) for text in findings]
    order = ("bad", "warn", "good")
    return sorted(said, key=lambda one: order.index(one.tone))


def _not_fast(manifest: Manifest) -> list[str]:
    """Why sparse weights are not faster, by backend."""
    reasons: dict[tuple[str, str, str], int] = {}
    for site in manifest["sites"]:
        for backend, found in site["verdicts"].items():
            if found["reason"]:
                key = (backend, found["kernel"], found["reason"])
                reasons[key] = reasons.get(key, 0) + 1
    return [
        f"{backend}: {count} sparse site{'s' if count > 1 else ''} run{'' if count > 1 else 's'} {kernel}: {why}"
        for (backend, kernel, why), count in reasons.items()
    ]


def listed(names: Sequence[str]) -> str:
    """`a, b and 7 more`."""
    shown, more = list(names[:_LISTED]), len(names) - _LISTED
    return f"{', '.join(shown)} and {more} more" if more > 0 else ", ".join(shown)


def dense_groups(manifest: Manifest) -> tuple[list[Group], list[Group]]:
    """Why weights are not sparse: sites that stay dense, and parameters that are no sites."""
    left = [
        (site["excluded"] or "no pattern was asked for", site["role"], site["name"])
        for site in manifest["sites"]
        if not site["pattern"]
    ]
    others = [(entry["reason"], entry["role"], entry["name"]) for entry in manifest["exclusions"]]
    return _grouped(left), _grouped(others)


def _grouped(entries: Sequence[tuple[str, str, str]]) -> list[Group]:
    found: dict[tuple[str, str], list[str]] = {}
    for reason, role, name in entries:
        found.setdefault((reason, role), []).append(name)
    return [Group(reason, role, tuple(names)) for (reason, role), names in found.items()]
