"""What a pattern would bring, before anything is pruned or trained: site by site, and for the whole model.

1. The dense graph is profiled at each token count; no weight is changed.
2. A site without a sparse kernel keeps its dense time, and the reason is told.
3. Whole-model figures follow from `prediction`: nothing gets faster but sites and the activations they absorb.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec import benchmark
from sparsec.backend import Backend, Verdict
from sparsec.cost import DENSE, break_even, speed
from sparsec.description import rows_per_item
from sparsec.errors import UsageError
from sparsec.layout import Values, table_bytes
from sparsec.pattern import Pattern
from sparsec.pipeline import Progress, no_progress
from sparsec.prediction import Prediction, Seconds, Survey, predict
from sparsec.profiling import Profile
from sparsec.program import Program
from sparsec.sites import Site

COMPARED = ("2:4", "64:2:5", "64:2:8", "64:2:16")
"""What is compared where no pattern was asked for."""
_KINDS = {  # of operators that are no sites
    "attention": "scaled_dot_product_attention softmax _softmax matmul bmm baddbmm",
    "norms": "layer_norm native_layer_norm rms_norm group_norm batch_norm rsqrt mean",
    "activations": "gelu relu silu tanh sigmoid erf",
    "layers that are no sites or stay dense": "linear addmm mm conv1d conv2d expert_linear",
}
_NAMED_FROM = 0.05  # a kind of operator is named where it takes this share of a run


@dataclass(frozen=True)
class Variant:
    """One choice of patterns: the program with them as targets, and what the backend says about each sparse site."""

    name: str
    program: Program
    verdicts: dict[str, Verdict]

    @property
    def patterns(self) -> dict[str, Pattern]:
        """The patterns of the sites that a sparse kernel would run."""
        sparse = self.program.sites.sparse
        return {site.name: site.pattern for site in sparse if site.pattern and self.verdicts[site.name].sparse}


def explain(
    program: Program,
    backend: Backend,
    targets: Mapping[str, Mapping[str, str]],
    tokens: Sequence[int],
    *,
    values: Values = "fp32",
    include: tuple[str, ...] = (),
    measure: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Plain data about each variant of targets (see `SiteTable.with_targets`), by its name.

    `measure`: time the kernels on each site's own shape, in place of the backend's table.
    Result: `sites`, what each would be in each variant; `whole`, a row for every token count and variant; `words`.
    Raises UsageError where nothing would be sparse.
    """
    import torch

    variants = [plan(program, backend, name, each, values, include) for name, each in targets.items()]
    wanted = sorted({pattern for one in variants for pattern in one.patterns.values()}, key=str)
    known = survey(program, backend, variants, tokens, progress)
    if measure:
        seconds = _measuring(backend, wanted, values)
    else:
        backend.calibrate(wanted, values, progress)
        seconds = table(backend, values, known)
    made = {one.name: [predict(known, each, one.patterns, seconds) for each in known.profiles] for one in variants}
    is_measured = measure or (
        bool(wanted) and all(backend.cost_basis(pattern, values) == "measured" for pattern in wanted)
    )
    return {
        "device": backend.runs_on(),
        "threads": torch.get_num_threads(),
        "kernels": backend.instruction_set(),
        "basis": "measured" if is_measured else "model",
        "values": values,
        "sites": [_site(site, variants, made, backend, values) for site in program.sites],
        "exclusions": [{"name": e.name, "role": e.role, "reason": e.reason} for e in program.sites.exclusions],
        "whole": [_whole(name, one) for name, each in made.items() for one in each],
        "words": "\n".join(_words(known, each) for each in known.profiles),
    }


def plan(
    program: Program, backend: Backend, name: str, targets: Mapping[str, str], values: Values, include: tuple[str, ...]
) -> Variant:
    """What would run for each site of a program with these targets."""
    one = program.replace(sites=program.sites.with_targets(targets, include)) if targets else program
    if not one.sites.sparse:
        raise UsageError(f"no site would be sparse with {name}: there is nothing to predict; give --pattern or --layer")
    return Variant(name, one, {verdict.site: verdict for verdict in backend.plan(one, values)})


def survey(
    program: Program, backend: Backend, variants: Sequence[Variant], tokens: Sequence[int], progress: Progress
) -> Survey:
    """Profile the dense program at each token count, without the sites that run sparse in any variant."""
    names = {name for one in variants for name in one.patterns}
    sites = tuple(site for site in program.sites if site.name in names)
    absorbed = {node: site for node, site in backend.absorbed(variants[0].program).items() if site in names}
    types = {n.target: n.meta["type"] for n in program.module.graph.nodes if n.op == "placeholder"}
    shapes = {
        "inputs": [{"name": name, "type": kind} for name, kind in types.items()],
        "dims": program.dims,
        "rows_per_item": rows_per_item(program),
    }
    left_out = Survey((), sites, absorbed).left_out
    profiles = []
    for done, case in enumerate(cases := benchmark.cases_of_tokens(program.inputs, shapes, tokens)):
        progress("profiling", done, len(cases))
        profiles.append(backend.profile(program, left_out, case.inputs, case.tokens))
    return Survey(tuple(profiles), sites, absorbed)


def table(backend: Backend, values: Values, known: Survey) -> Seconds:
    """Seconds as the backend's table knows them, with the activations that the survey leaves out."""
    operators = Counter(known.absorbed.values())
    return lambda site, pattern, rows: backend.cost_activated(
        site.shape, pattern, rows, operators[site.name] // len(site.users), values
    )


def _measuring(backend: Backend, patterns: Sequence[Pattern], values: Values) -> Seconds:
    """Seconds as timed now: each shape and token count once, all patterns beside the dense product."""
    ordered = [DENSE, *patterns]
    known: dict[tuple[tuple[int, int, int], int], list[float]] = {}

    def seconds(site: Site, pattern: Pattern, rows: int) -> float:
        key = (site.shape, rows)
        if key not in known:
            known[key] = backend.measure(site.shape, ordered, [rows], values)[0]
        return known[key][ordered.index(pattern)]

    return seconds


def _whole(variant: str, one: Prediction) -> dict[str, Any]:
    return {
        "variant": variant,
        "tokens": one.tokens,
        "dense_seconds": one.dense,
        "sparse_seconds": one.sparse,
        "speed": one.speed,
        "rest_share": one.rest / one.dense,
        "limit": one.limit,
    }


def _site(
    site: Site, variants: Sequence[Variant], made: Mapping[str, Sequence[Prediction]], backend: Backend, values: Values
) -> dict[str, Any]:
    batch, rows, cols = site.shape
    return {
        "name": site.name,
        "role": site.role,
        "kind": site.kind,
        "shape": list(site.shape),
        "nbytes_dense": 4 * batch * rows * cols,
        "variants": {one.name: _site_in(one, site.name, made[one.name], backend, values) for one in variants},
    }


def _site_in(
    variant: Variant, name: str, made: Sequence[Prediction], backend: Backend, values: Values
) -> dict[str, Any]:
    site = variant.program.sites[name]
    if site.pattern is None:
        return {"pattern": None, "kernel": "dense", "reason": site.excluded or "no pattern was asked for"}
    verdict = variant.verdicts[name]
    value_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[values]
    found = {
        "pattern": str(site.pattern),
        "kernel": verdict.kernel,
        "reason": verdict.reason,
        "nbytes": table_bytes(site.pattern, site.shape, value_bytes),
    }
    if not verdict.sparse:
        return found
    layers = {one.tokens: layer for one in made for layer in one.layers if layer.site == name}
    in_model = math.prod(layer.dense / layer.sparse for layer in layers.values()) ** (1 / len(layers))
    alone = speed(backend.cost, site.shape, site.pattern, tuple(layer.rows for layer in layers.values()), values)
    return {
        **found,
        "break_even_tokens": break_even(backend.cost, site.shape, site.pattern, values, in_model / alone),
        "speed": {str(tokens): layer.dense / layer.sparse for tokens, layer in layers.items()},
        "seconds": {str(tokens): [layer.dense, layer.sparse] for tokens, layer in layers.items()},
    }


def _words(known: Survey, made: Profile) -> str:
    """What limits at one token count, in a sentence."""
    kinds = {name: kind for kind, names in _KINDS.items() for name in names.split()}
    rest = [node for name, node in made.nodes.items() if name not in known.left_out]
    whole = made.rest / made.seconds
    shares: dict[str, float] = {}
    for node in rest:
        kind = kinds.get(node.operation, "other operators")
        shares[kind] = shares.get(kind, 0.0) + whole * node.seconds / sum(one.seconds for one in rest)
    named = sorted(((share, kind) for kind, share in shares.items() if share >= _NAMED_FROM), reverse=True)
    most = ", ".join(f"{kind} {100 * share:.0f} %" for share, kind in named)
    return (
        f"{made.tokens} tokens: {100 * whole:.0f} % of the time is outside the sites{f' ({most})' if most else ''}: "
        f"the most that any pattern can give is {1 / max(whole, 1e-9):.1f}x"
    )
