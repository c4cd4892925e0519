"""What people see: tables, one progress bar, plain words."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsec.description import task_words, trained_on

if TYPE_CHECKING:
    from sparsec.backend import Check
    from sparsec.inspection import Found
    from sparsec.pipeline import PassReport
    from sparsec.sites import Exclusion

_WIDTH = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110  # of a pipe or file; rich would take 80
out = Console(highlight=False, width=_WIDTH)


def megabytes(nbytes: int) -> str:
    """Bytes as decimal megabytes."""
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"


def manifest(data: dict[str, Any], folder_bytes: int) -> None:
    """The end of a compile, and `inspect` of an artifact: sites, sizes, quality, speed."""
    sites = data["sites"]
    out.print(_sites_table(sites, list(data["backends"])))
    out.print(summary(sites, data["exclusions"]))
    for line in _caveats(sites):
        out.print(line)
    if "pruned_before" in data:
        out.print(f"[yellow]{data['pruned_before']}[/]")
    for text, one in data.get("intersections", {}).items():
        out.print(
            f"{text}: both keep {one['together']:.3f} of the weights' magnitude in {one['sites']} sites, "
            f"{text.partition('+')[0]} alone {one['alone']:.3f}"
        )
    for one in data.get("passes", ()):
        if one["pass"].partition("{")[0] == "permute":
            _permuted(one)
    _sizes(data, folder_bytes)
    quality = data["quality"]
    error = quality["relative_error"]  # None where it could not be measured
    figure = "" if error is None else f"relative error {error:.3f}, "
    out.print(f"[bold]Quality[/] {escape(quality['words'])}; {figure}on {quality['samples']}")
    if "task" in quality:
        out.print(f"[bold]Task[/] {escape(task_words(quality['task']))}")
    for one in trained_on(data):
        out.print(f"[bold]Trained[/] on {escape(_trained(one))}")
        if "remark" in one:
            out.print(f"[yellow]{escape(one['remark'])}[/]")
    if "magnitude" in quality:
        out.print(_beside_magnitude(quality))
    if "calibration" in data:
        out.print(f"[bold]Calibrated[/] on {data['calibration']['words']}")
    if "uncalibrated" in data:
        out.print(f"[yellow]Pruned by magnitude, without data: {escape(data['uncalibrated'])}[/]")
    if (values := data.get("values", {})).get("type", "fp32") != "fp32":
        out.print(
            f"[bold]Values[/] stored as {values['type']}: outputs differ from the masked fp32 model's by "
            f"{values['relative_error']:.4f} (relative error), at most {values['largest_difference']:.1e}"
        )
    for check in data.get("checks", ()):
        out.print(f"[green]proven[/] {check['name']}: {check['detail']}")
    if "speed" in data:
        out.print(speed_table(data["speed"], "kernel"))


def wrote(folder: Path) -> None:
    """The last lines of a compile: where the artifact is, and what to do next."""
    out.print(f"[bold]Wrote {escape(str(folder))}[/]")
    out.print(f"Look at it: sparsec report {escape(shlex.quote(str(folder)))}", soft_wrap=True)


def _trained(training: dict[str, Any]) -> str:
    classes = training.get("classes", ())
    words = [training["words"], *([f"classes {', '.join(classes)}"] if classes else [])]
    return "; ".join([*words, *([training["head"]] if "head" in training else [])])


def _permuted(report: dict[str, Any]) -> None:
    """What patterns keep before and after a permute pass, or that it did nothing."""
    kept = {name.removesuffix(".weight"): shares for name, shares in report.get("retained", {}).items()}
    groups: dict[str, list[str]] = {}
    for name in kept:
        groups.setdefault(re.sub(r"\d+", "*", name, count=1), []).append(name)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("permuted", overflow="fold")
    for column in ("kept before", "kept after"):
        table.add_column(column, justify="right")
    for name, group in groups.items():
        means = (sum(kept[one][i] for one in group) / len(group) for i in range(2))
        table.add_row(f"{name} x{len(group)}" if len(group) > 1 else group[0], *(f"{mean:.3f}" for mean in means))
    if groups:
        out.print(table)
    out.print(f"[bold]Permuted[/] {escape(report['words'])}")


def _beside_magnitude(quality: dict[str, Any]) -> Table:
    """What calibration data gained over pruning by magnitude."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("pruned by")
    for column in ("embedding cosine", "vector cosine", "relative error"):
        table.add_column(column, justify="right")
    for name, row in (("magnitude", quality["magnitude"]), ("one-shot", quality)):
        embedding = row["embedding_cosine"]
        figures = ("" if embedding is None else f"{embedding:.3f}", f"{row['cosine']:.3f}")
        table.add_row(name, *figures, f"{row['relative_error']:.3f}")
    return table


def summary(sites: list[dict[str, Any]], exclusions: list[dict[str, Any]]) -> str:
    """`36 of 37 sites sparse, the others because ...`."""
    dense = [site for site in sites if not site["pattern"]]
    text = f"[bold]{len(sites) - len(dense)} of {len(sites)} sites sparse[/]"
    reasons: dict[str, list[str]] = {}
    for site in dense:
        reasons.setdefault(site["excluded"] or "no pattern was asked for", []).append(site["name"])
    for reason, names in reasons.items():
        text += f"; {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} dense: {reason}"
    if exclusions:
        roles = [entry["role"] for entry in exclusions]
        counts = ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))
        text += f"\nNot sites: {counts} parameters"
        for entry in exclusions:
            if entry["role"] == "other":
                text += f"\n  {entry['name']}: {entry['reason']}"
    return text


def _caveats(sites: list[dict[str, Any]]) -> list[str]:
    """Why sparse weights are not faster: `onnx: 36 sparse sites run dense: onnxruntime has no kernel ...`."""
    reasons: dict[tuple[str, str, str], int] = {}
    for site in sites:
        for backend, verdict in site["verdicts"].items():
            if verdict["reason"]:
                key = (backend, verdict["kernel"], verdict["reason"])
                reasons[key] = reasons.get(key, 0) + 1
    return [f"{backend}: {count} sparse sites run {kernel}: {why}" for (backend, kernel, why), count in reasons.items()]


def _sites_table(sites: list[dict[str, Any]], backends: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("site", overflow="fold")
    for column in ("shape", "pattern", "kept", "bytes", *backends):
        table.add_column(column, justify="right" if column in ("shape", "kept", "bytes") else "left", no_wrap=True)
    for group in _groups(sites):
        site, count = group[0], len(group)
        name = (re.sub(r"\d+", "*", site["name"], count=1) if count > 1 else site["name"]).removesuffix(".weight")
        retained = [s["retained"] for s in group if s["retained"] is not None]
        sparse = site["nbytes_sparse"]
        table.add_row(
            f"{name}{f' x{count}' if count > 1 else ''}",
            "x".join(map(str, site["shape"][1:])),
            site["pattern"] or "dense",
            f"{sum(retained) / len(retained):.3f}" if retained else "",
            f"{sparse / site['nbytes_dense']:.3f}x" if sparse else "1x",
            *(site["verdicts"].get(backend, {}).get("kernel", "dense") for backend in backends),
        )
    words = sorted({f"{site['pattern']} = {site['words']}" for site in sites if site["pattern"]})
    table.caption = "; ".join([*words, "kept = share of the summed score"])
    return table


def _groups(sites: list[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    """Sites that differ only in a layer number, together."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for site in sites:
        verdicts = str({name: verdict["kernel"] for name, verdict in site["verdicts"].items()})
        key = (
            re.sub(r"\d+", "*", site["name"], count=1),
            site["pattern"],
            tuple(site["shape"]),
            verdicts,
            site["excluded"],
        )
        groups.setdefault(key, []).append(site)
    return groups.values()


def _sizes(data: dict[str, Any], folder_bytes: int) -> None:
    dense = sum(site["nbytes_dense"] for site in data["sites"] if site["pattern"])
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("size", "sparse weights", "of dense", "all files", "dense model"):
        table.add_column(column, justify="left" if column == "size" else "right")
    for name, entry in data["backends"].items():
        ratio = f"{entry['nbytes_sparse'] / dense:.3f}x" if dense else ""
        whole = megabytes(data["nbytes"]["dense_model"])
        table.add_row(name, megabytes(entry["nbytes_sparse"]), ratio, megabytes(entry["nbytes"]), whole)
    table.add_row("folder", "", "", megabytes(folder_bytes), "")
    out.print(table)


def speed_table(rows: list[dict[str, Any]], ours: str) -> Table:
    """Whole-model times; ratios first."""
    others = [name for name in rows[0]["seconds"] if name != ours]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("tokens", justify="right")
    for name in others:
        table.add_column(f"speed vs {name}", justify="right")
    for name in (ours, *others):
        table.add_column(f"{name} ms", justify="right")
    for row in rows:
        seconds = row["seconds"]
        ratios = [f"{seconds[name] / seconds[ours]:.2f}x" for name in others]
        times = [f"{1e3 * seconds[name]:.2f}" for name in (ours, *others)]
        table.add_row(str(row["tokens"]), *ratios, *times)
    table.caption = f"whole model, {rows[0]['threads']} threads, best of several interleaved runs on this machine"
    return table


def checks(results: list[Check]) -> None:
    """One line a check."""
    for check in results:
        out.print(f"{'[green]holds[/]' if check.ok else '[red]FAILS[/]'}  {check.name}: {check.detail}", soft_wrap=True)


def found(weights: list[Found], others: Sequence[Exclusion] = ()) -> None:
    """What `inspect` finds in a checkpoint, or in an .onnx file, whose other matrices follow with their reasons."""
    noted = any(one.note for one in weights)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("weight", "shape", "zeros", "pattern found", *(("read by",) if noted else ())):
        table.add_column(column, overflow="fold")
    for one in weights:
        shape = " x ".join(map(str, one.shape))
        pattern = (
            f"{one.pattern} ({one.pattern.words})" if one.pattern else "none of the usual" if one.sparse else "dense"
        )
        table.add_row(escape(one.name), shape, f"{100 * one.sparsity:.1f} %", pattern, *([escape(one.note)] * noted))
    out.print(table)
    out.print(f"[bold]{sum(one.sparse for one in weights)} of {len(weights)} weights sparse[/]")
    reasons: dict[str, list[str]] = {}
    for other in others:
        reasons.setdefault(other.reason, []).append(other.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        out.print(f"not looked at: {names[0]}{more}: {reason}", markup=False, soft_wrap=True)


def text(title: str, body: str) -> None:
    """A dump or a difference, as it stands: it may be piped into another program."""
    sys.stdout.write((f"{title}\n" if title else "") + body)
    sys.stdout.flush()


def reports(passes: Sequence[PassReport]) -> None:
    """What each pass of `opt` took and said, on stderr: stdout holds text that is the same on every run."""
    console = Console(stderr=True, highlight=False, width=_WIDTH)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("pass", "seconds", "result", "notes"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    for one in passes:
        notes: dict[str, list[str]] = {}
        for note in one.notes:
            notes.setdefault(note.text, []).append(note.site)
        said = [
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in notes.items()
        ]
        result = ", ".join(f"{key}={value}" for key, value in one.data.items())
        table.add_row(*map(escape, (one.text, f"{one.seconds:.3f}", result, "; ".join(said))))
    console.print(table)


def catalogue(rows: Sequence[tuple[str, ...]], *columns: str) -> None:
    """A plain table of names and what they are."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)
