"""The permute pass: renumber channels so that patterns keep more, folded into the weights or left to the kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparsec.errors import RecipeError
from sparsec.oneshot.scores import SCORES
from sparsec.pattern import VNM, Strip
from sparsec.permuting.folding import folded
from sparsec.permuting.objective import grouped
from sparsec.permuting.outputs import assign_rows
from sparsec.permuting.scoring import Score, scores_of
from sparsec.pipeline import Context, Equivalence, Note, Pass, PassResult
from sparsec.program import Program
from sparsec.sites import Site

Mode = Literal["graph", "kernel", "both", "auto"]
_KERNEL = "kernel"  # the backend whose kernels take columns from anywhere, and rows
_STRIPS = {_KERNEL, "onnx", "hf"}  # those that a strip of neighbours does no harm


@dataclass(frozen=True)
class Permute(Pass):
    """Permute channels so that the patterns keep more of the score; what the program computes stays as it is.

    1. graph: every variable that `sparsec.axes` finds is searched, for all sites that it moves together, and folded
       into all parameters that it moves: weights, biases, norms, embeddings. No operator is added.
    2. The permuted program must agree with the given one in float64 to 1e-9, or the pass raises and changes nothing.
    3. kernel: V:N:M patterns become V:N:M@strip, whose strips take columns from anywhere and whose rows need not be
       neighbours. Weights stay as they are.
    4. both: as graph; then V:N:M become strips of neighbours, as the packed operators of ONNX run no others.
       auto: kernel for the kernel backend alone, both for it with onnx or hf, else graph (2:4 units read no strips).
    5. A site's pattern is the one it has, or `pattern` when no site has one. A site that is selected already fixes the
       variables that move it: permute comes before passes that choose weights.
    6. `seconds` ends the search early; 0 permutes nothing. Without it, equal programs give equal permutations.
    """

    name: ClassVar[str] = "permute"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"permuted"})
    equivalence: ClassVar[Equivalence] = "close"

    mode: Mode = "graph"
    pattern: str = ""
    """Pattern for all sites not excluded, where none was set by targets."""
    score: Score = "magnitude"
    """What shall be kept; wanda and ria look at calibration data."""
    rounds: int = 2
    """Times that all variables are searched in turn."""
    seconds: float = float("inf")

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.seconds >= 0:
            raise RecipeError(
                f"pass permute: expected rounds of 1 or more and seconds of 0 or more, found {self.rounds} and "
                f"{self.seconds:g}"
            )

    def run(self, program: Program, ctx: Context) -> PassResult:
        sites = program.sites
        if not sites.sparse:
            if not self.pattern:
                raise RecipeError("pass permute: no site has a pattern; set targets, or write permute{pattern=64:2:5}")
            sites = sites.with_targets({"*": self.pattern})  # rule 5
        program = program.replace(sites=sites)
        start, mode = time.perf_counter(), self._mode(ctx)
        free = [site for site in sites.sparse if site.selection is None and site.mask is None]
        wanted = [site for site in free if mode != "kernel" and grouped(site.pattern)]
        strips = [site for site in free if mode == "kernel" or (mode == "both" and site in wanted) if _as_strip(site)]
        chosen = [site for site in free if site in wanted or site in strips]
        notes = [Note(site.name, _why(site, mode)) for site in sites if site not in chosen]
        if not self.seconds or not chosen:
            words = f"nothing: {'no seconds were given' if not self.seconds else f'no site gains in mode {mode}'}"
            return PassResult(program, (*notes, Note("all", words)), {"mode": mode, "words": words})
        before = self._scored(program, chosen, ctx)
        found = folded(
            program,
            wanted,
            {site.name: before[site.name] for site in wanted},
            self.rounds,
            ctx.seed,
            start + self.seconds,
            lambda done, total: ctx.progress("searching permutations", done, total),
        )
        after = self._scored(found.program, chosen, ctx)

        def finish(site: Site) -> tuple[Site, list[float]]:
            score, now = after[site.name], site
            if site in strips:  # rules 3 and 4
                search = mode == "kernel" and time.perf_counter() < start + self.seconds
                now = _with_rows(site, score, ctx.seed, search)
            return now, [_retained(site, before[site.name]), _retained(now, score)]

        changed, kept = [], {}
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # scipy's assignments take one thread, without a lock
            for now, shares in pool.map(finish, chosen):
                kept[now.name] = shares
                changed.append(now)
                ctx.progress("choosing columns and rows", len(changed), len(chosen))
        notes += [Note(name, why) for name, why in found.left.items()]
        seconds = time.perf_counter() - start
        words = f"mode {mode}, in {seconds:.0f} s; patterns keep {_words(kept, self.score)}"
        if found.difference is not None:
            words += f"; proven in float64, where outputs differ by {found.difference:.0e}"
        data = {
            "mode": mode,
            "words": words,
            "retained": kept,
            "variables": found.variables,
            "difference": found.difference,
            "seconds": seconds,
        }
        return PassResult(found.program.with_sites(changed), tuple(notes), data)

    def _mode(self, ctx: Context) -> Mode:
        """Rule 4."""
        if self.mode != "auto":
            return self.mode
        names = set(ctx.resources.get("backends") or (getattr(ctx.resources.get("backend"), "name", ""),))
        if _KERNEL not in names or names - _STRIPS:
            return "graph"
        return "both" if len(names) > 1 else "kernel"

    def _scored(self, program: Program, sites: Sequence[Site], ctx: Context) -> dict[str, Tensor]:
        batches = () if SCORES[self.score].needs == "nothing" else ctx.calibration(self.name).batches
        return scores_of(program, sites, self.score, batches)


def _as_strip(site: Site) -> Strip | None:
    """The pattern of strips for a site of windows that kernels run either way, or None."""
    found = site.pattern
    if isinstance(found, Strip):
        return found
    if isinstance(found, VNM) and found.v % Strip.ROWS == 0:
        return Strip(found.v, found.n, found.m)
    return None


def _with_rows(site: Site, score: Tensor, seed: int, search: bool) -> Site:
    """A site of strips, and the rows that share them where there is time to search."""
    pattern = _as_strip(site)
    assert pattern is not None
    site = site.replace(pattern=pattern)
    if not search:
        return site
    rows = torch.stack([assign_rows(one, pattern, seed) for one in score]).to(torch.int32)
    moved = bool((rows != torch.arange(rows.shape[1])).any())
    return site.replace(rows=rows if moved else None)


def _retained(site: Site, score: Tensor) -> float:
    """Share of the score that the site's pattern keeps."""
    _, mask = site.choose(score)
    total = float(score.sum(dtype=torch.float64))
    return float((score * mask).sum(dtype=torch.float64)) / total if total else 1.0


def _words(kept: Mapping[str, Sequence[float]], score: Score) -> str:
    before, after = (sum(column) / len(kept) for column in zip(*kept.values(), strict=True))
    return f"{after:.3f} of the score ({score}), {before:.3f} before, on average over {len(kept)} sites"


def _why(site: Site, mode: Mode) -> str:
    """Why a site is not permuted for."""
    if site.excluded or site.pattern is None:
        return site.excluded or "no pattern"
    if site.selection is not None or site.mask is not None:
        return "its weights are chosen already; put permute before the pass that does"
    if grouped(site.pattern) is None and _as_strip(site) is None:
        return f"{site.pattern} keeps the same in any order"
    return f"{site.pattern}: mode {mode} does not permute it"
