"""What `explain` and `select` print."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from sparsec import show
from sparsec.cost import MOST_TOKENS

if TYPE_CHECKING:
    from sparsec.search import Choice


def explanation(data: Mapping[str, Any], all_sites: bool) -> None:
    """Two tables, why sites stay dense, and what limits."""
    tokens = list(dict.fromkeys(row["tokens"] for row in data["whole"]))
    names = list(dict.fromkeys(row["variant"] for row in data["whole"]))
    show.out.print(_sites(data, tokens, names, all_sites))
    for line in _reasons(data["sites"], names):
        show.out.print(escape(line))
    show.out.print(_whole(data, tokens, names))
    show.out.print(escape(data["words"]))
    if data["basis"] == "model":
        place = "here" if _here(data) else f"on {escape(data['device'])}"
        show.out.print(f"[bold]model[/]: kernels were not measured {place}, these figures are a formula's")


def _sites(data: Mapping[str, Any], tokens: Sequence[int], names: Sequence[str], all_sites: bool) -> Table:
    groups = [[site] for site in data["sites"]] if all_sites else _groups(data["sites"])
    counts = ", ".join(map(str, tokens))
    table = _table("site" if all_sites else "role", "sites", "shape", *(_title(name, data["sites"]) for name in names))
    for group in groups:
        name = group[0]["name"].removesuffix(".weight") if all_sites else _roles(group)
        shape = "x".join(map(str, group[0]["shape"][1:]))
        cells = [_cell([site["variants"][variant] for site in group], tokens) for variant in names]
        table.add_row(escape(name), str(len(group)), shape, *cells)
    table.caption = (
        f"times faster than dense at {counts} tokens ({_basis(data)}); "
        "to n: still faster at n tokens, not at twice as many; bytes of dense below the pattern"
    )
    return table


def _roles(group: Sequence[Mapping[str, Any]]) -> str:
    """`attention.query/key/value, linear`."""
    parts: dict[str, list[str]] = {}
    for role in dict.fromkeys(site["role"] for site in group):
        whole, _, part = role.partition(".")
        parts.setdefault(whole, []).append(part)
    return ", ".join(f"{whole}.{'/'.join(each)}" if each[0] else whole for whole, each in parts.items())


def _title(variant: str, sites: Sequence[Mapping[str, Any]]) -> str:
    """The variant, and what its sparse sites take of their dense bytes."""
    found = [site for site in sites if "nbytes" in site["variants"][variant]]
    dense = sum(site["nbytes_dense"] for site in found)
    return f"{variant}\n{sum(site['variants'][variant]['nbytes'] for site in found) / dense:.2f}x bytes"


def _cell(found: Sequence[Mapping[str, Any]], tokens: Sequence[int]) -> str:
    if "speed" not in found[0]:
        return "dense"
    means = [sum(one["speed"][str(n)] for one in found) / len(found) for n in tokens]
    most = found[0]["break_even_tokens"]
    limit = "" if most >= MOST_TOKENS else f" to {most}" if most else " never"
    return " ".join(f"{mean:.1f}" for mean in means) + limit


def _groups(sites: Sequence[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """Sites of equal shape that fare alike, together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for site in sites:
        fares = {k: (v["pattern"], v["kernel"], v["reason"]) for k, v in site["variants"].items()}
        groups.setdefault(str((site["shape"], fares)), []).append(site)
    return groups.values()


def _reasons(sites: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Which sites stay dense, or run sparse with a caveat, and why; once for all variants that agree."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for site in sites:
        for name in names:
            if reason := site["variants"][name]["reason"]:
                kind = "dense" if "speed" not in site["variants"][name] else "sparse"
                reasons.setdefault((kind, reason), []).append(site["name"])
    lines = []
    for (kind, reason), found in reasons.items():
        unique = list(dict.fromkeys(found))
        lines.append(f"{unique[0]}{f' and {len(unique) - 1} more' if len(unique) > 1 else ''} {kind}: {reason}")
    return lines


def _whole(data: Mapping[str, Any], tokens: Sequence[int], names: Sequence[str]) -> Table:
    table = _table("tokens", "dense ms", *names, "outside sites")
    for count in tokens:
        rows = {row["variant"]: row for row in data["whole"] if row["tokens"] == count}
        dense = next(iter(rows.values()))
        cells = [f"{rows[name]['speed']:.2f}x ({1e3 * rows[name]['sparse_seconds']:.2f} ms)" for name in names]
        share = min(row["rest_share"] for row in rows.values())
        table.add_row(str(count), f"{1e3 * dense['dense_seconds']:.2f}", *cells, f"{100 * share:.0f} %")
    label = "" if _here(data) else f" ({data['basis']})"
    table.caption = f"whole model, predicted: times faster than the dense graph on {data['device']}{label}"
    return table


def _here(data: Mapping[str, Any]) -> bool:
    return bool(data["device"] == "this machine")


def _basis(data: Mapping[str, Any]) -> str:
    """What the figures rest on: `measured, 2 threads`, `model, NVIDIA H200, in bf16`."""
    return f"{data['basis']}, {data['threads']} threads" if _here(data) else f"{data['basis']}, {data['device']}"


def choice(found: Choice) -> None:
    """Which pattern each group of sites gets, and what comes of it."""
    groups: dict[tuple[str, str], int] = {}
    for name, pattern in found.patterns.items():
        key = (re.sub(r"\d+", "*", name).removesuffix(".weight"), pattern or "dense")
        groups[key] = groups.get(key, 0) + 1
    table = _table("site", "pattern", "sites")
    for (name, pattern), count in sorted(groups.items()):
        table.add_row(escape(name), pattern, str(count))
    show.out.print(table)
    for name, why in found.left.items():
        show.out.print(escape(f"{name} dense: {why}"))
    if found.considered:
        each = ", ".join(f"{one.pattern} {one.diversity:.4f}" for one in found.considered)
        show.out.print(f"smallest M of each V that meets the budget, with its mask diversity ln K: {each}")
    if found.front:
        show.out.print(_front(found))
    figure = f"{found.figure.words} {found.quality:.3f}"
    if not found.request.timed:
        show.out.print(f"[bold]{100 * found.density:.1f} % of the weights stay[/]; {figure}")
        return
    show.out.print(
        f"[bold]{found.speed:.2f}x predicted[/] at {found.tokens} tokens ({1e3 * found.dense_seconds:.2f} ms dense, "
        f"{1e3 * found.seconds:.2f} ms sparse), {100 * found.density:.1f} % of the weights stay; {figure}"
    )


def _front(found: Choice) -> Table:
    """What other budgets would give."""
    timed = found.request.timed
    table = _table(*(["speed"] if timed else []), "density", found.figure.key.replace("_", " "), "patterns")
    for one in found.front:
        speed = [f"{one.speed:.2f}x"] if timed else []
        table.add_row(*speed, f"{one.density:.3f}", f"{one.figure:.3f}", str(one.patterns))
    table.caption = f"what other budgets would give: {found.figure.words}"
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return table
