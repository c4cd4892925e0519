"""Sites that are solved as one matrix: weights with the same inputs, one below the other.

q, k and v, or gate and up, have one Gram matrix between them. As one tall matrix they share its factor, and every step
of a solver works on more rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from sparsec import _fx
from sparsec.errors import SparsecError
from sparsec.oneshot.journal import Entry
from sparsec.oneshot.moments import Moments
from sparsec.oneshot.solving import Method, Solved, solve
from sparsec.oneshot.stops import Stop, bias_of
from sparsec.pattern import NM, SharedColumns
from sparsec.selection import Selection, as_stored, in_place

if TYPE_CHECKING:
    from torch import Tensor
    from torch.fx import GraphModule

    from sparsec.program import Program
    from sparsec.sites import Site

_PLAIN = ("linear", "conv1d_hf")
_AT_ONCE = 1 << 18  # weights whose magnitudes are added up together
_TOGETHER = ("sparsegpt", "alps")  # solvers that treat every row (or strip of rows) by itself


def teams_of(module: GraphModule, stop: Stop, method: Method) -> list[tuple[Site, ...]]:
    """The sites of a stop, those together that can be solved together, in order."""
    teams: dict[object, list[Site]] = {}
    for site in stop.sites:
        alone = stop.shared or not is_plain(site) or method.solver not in _TOGETHER
        alike = site.pattern, site.shape[2], site.read(module).dtype, bias_of(module, site) is None, _fits(site)
        key = site.name if alone else alike
        teams.setdefault(key, []).append(site)
    return [tuple(team) for team in teams.values()]


def is_plain(site: Site) -> bool:
    """Whether all of a site's uses multiply the same matrix with vectors that lie in a row."""
    return site.kind in _PLAIN and site.shape[0] == 1


def _fits(site: Site) -> object:
    """Sites of equal answers can stand one below the other: every strip of rows is whole."""
    pattern = site.pattern.executable if site.pattern else None
    if isinstance(pattern, NM) or (isinstance(pattern, SharedColumns) and site.shape[1] % pattern.v == 0):
        return True
    return site.name


def solve_team(
    program: Program,
    team: Sequence[Site],
    method: Method,
    moments: Mapping[int, Moments],
    gathered: Mapping[str, Tensor],
) -> Iterator[tuple[Site, Entry]]:
    """Every site of a team with what it becomes. Raises SparsecError that names the first site."""
    first = team[0]
    assert first.pattern is not None
    weights = [as_stored(site.read(program.module), site.rows) for site in team]  # strips are neighbours there
    biased = bias_of(program.module, first) is not None
    gradients = gathered.get(first.name)
    if gradients is not None:
        gradients = as_stored(gradients, first.rows)
    solved = []
    for item in range(first.shape[0]):
        extra = None if gradients is None else gradients[item]
        try:
            parts = [weight[item] for weight in weights]
            solved.append(solve(parts, first.pattern, method, moments.get(item), extra, biased))
        except SparsecError as error:
            error.args = (f"{first.name}: {error}",)
            raise
    start = 0
    for site in team:
        yield site, _entry(program, site, solved, start)
        start += site.shape[1]


def _entry(program: Program, site: Site, solved: Sequence[Solved], start: int) -> Entry:
    """The part of a team's solution that is a site's: its rows begin at `start`."""
    import torch

    assert site.pattern is not None
    rows, pattern = slice(start, start + site.shape[1]), site.pattern.executable
    strips = slice(0, 0)
    if isinstance(pattern, SharedColumns):
        strips = slice(start // pattern.v, start // pattern.v + pattern.strips(site.shape[1]))
    columns = [one.selection.columns[:, strips] for one in solved if one.selection.columns is not None]
    kept = [one.selection.kept[:, rows] for one in solved if one.selection.kept is not None]
    selection = Selection(
        torch.cat([one.selection.positions[:, rows] for one in solved]),
        torch.cat(columns) if columns else None,
        torch.cat(kept) if kept else None,
        site.rows,
    )
    bias, shifts = bias_of(program.module, site), [one.bias_shift for one in solved if one.bias_shift is not None]
    if bias is not None and shifts:
        old = _fx.get_tensor(program.module, bias).detach()
        shift = in_place(torch.stack([shift[rows] for shift in shifts])[:, :, None], site.rows)
        new = (old.float() + shift.reshape(old.shape)).to(old.dtype)
    weight = torch.stack([one.weight[rows] for one in solved]) if len(solved) > 1 else solved[0].weight[None, rows]
    weight = in_place(weight, site.rows)
    errors = [one.error for one in solved if one.error is not None]
    scored = [one.retained for one in solved if one.retained is not None]
    return Entry(
        weight,
        selection,
        new if bias is not None and shifts else None,
        _mean(scored) if scored else _retained(site.read(program.module), weight),
        _mean(errors) if errors else None,
        _note([one.note for one in solved]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _retained(dense: Tensor, kept: Tensor) -> float:
    """Share of the magnitude that is kept."""
    import torch

    total = part = 0.0
    for size, own in zip(dense.flatten().split(_AT_ONCE), kept.flatten().split(_AT_ONCE), strict=True):
        size = size.abs().float()
        total += float(size.sum())
        part += float(size.dot((own != 0).view(torch.uint8).float()))  # twice as fast as where()
    return part / total if total else 1.0


def _note(notes: Sequence[str]) -> str:
    """The notes of a site's matrices as one: `matrix 1, 5: ...` where there are several matrices."""
    if len(notes) == 1:
        return notes[0]
    said = [text for text in dict.fromkeys(notes) if text]
    return "; ".join(f"matrix {', '.join(str(i) for i, n in enumerate(notes) if n == text)}: {text}" for text in said)
