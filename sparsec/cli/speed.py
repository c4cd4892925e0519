"""Commands that predict speed: `explain` what a pattern would bring, `select` patterns for a speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsec.cli.terminal import (
    Calib,
    CalibrationSamples,
    Json,
    MaxLength,
    TextColumns,
    Threads,
    print_json,
    progress,
    reporting,
    set_threads,
    starting,
)

Model = Annotated[str, typer.Argument(help="MODEL as for compile, or an artifact: its model and its patterns")]
Ignore = Annotated[list[str] | None, typer.Option(help="Selector of sites that stay dense. Repeatable.")]
Values = Annotated[str, typer.Option(help="Stored sparse weights: fp32, bf16, int8.")]
Trust = Annotated[bool, typer.Option("--trust", help="Read a .pt2 file, which can run code.")]


def explain(
    model: Model,
    pattern: Annotated[str | None, typer.Option(help="Pattern of every eligible site; default: compare some.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="SELECTOR=PATTERN for some sites. Repeatable.")] = None,
    ignore: Ignore = None,
    include_pooler: Annotated[bool, typer.Option("--include-pooler", help="Poolers may be sparse too.")] = False,
    tokens: Annotated[str, typer.Option(help="Comma-separated token counts.")] = "1,32,128,512",
    backend: Annotated[str, typer.Option(help="The backend that would run it.")] = "kernel",
    device: Annotated[
        str, typer.Option(help="cpu; a GPU that need not be here: h200; or one of this machine: cuda.")
    ] = "cpu",
    values: Values = "fp32",
    measure: Annotated[bool, typer.Option("--measure", help="Time the kernels on each site's own shape.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="One line for every site.")] = False,
    trust: Trust = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say what would become sparse and how much faster it would be, before anything is pruned or trained."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import explain as job
            from sparsec.recipe import make_backend
            from sparsec.shorthand import targets_of, token_counts, values_of

        counts, stored, one = token_counts(tokens), values_of(values), make_backend(backend)
        one = one if device == "cpu" else one.on(device)
        name, given, include = _model(model)
        targets = targets_of(pattern, layer, ignore)
        asked = {**given, **targets} if pattern or layer or given else {}
        variants = {pattern or "as asked": asked} if asked else {p: {"*": p, **targets} for p in job.COMPARED}
        set_threads(threads)
        program = _load(name, trust)
        include = ("pooler",) if include_pooler else include
        with progress(as_json) as say:
            data = job.explain(
                program, one, variants, counts, values=stored, include=include, measure=measure, progress=say
            )
        if as_json:
            return print_json({"model": name, **data})
        from sparsec import show_speed

        show_speed.explanation(data, sites)


def select(
    model: Model,
    speedup: Annotated[
        float | None, typer.Option(help="Times faster than dense that the whole model shall be.")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="Milliseconds that a run of the model may take.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of the sites' weights that may stay.")] = None,
    budget: Annotated[str | None, typer.Option(help="One of these as NAME=AMOUNT: density=0.4.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At this many tokens.")] = 128,
    mode: Annotated[str, typer.Option(help="ours: site by site; paper: the rule of Beyond 2:4, one V and M.")] = "ours",
    objective: Annotated[
        str,
        typer.Option(help="What to lose least: retained (score), reconstruction (outputs), sensitivity (gradients)."),
    ] = "retained",
    uniform: Annotated[bool, typer.Option("--uniform", help="One pattern for all sites.")] = False,
    patterns: Annotated[str | None, typer.Option(help="Comma-separated candidates, such as 2:4,64:2:8.")] = None,
    diversity: Annotated[str, typer.Option(help="Formula of mode paper: counted, printed.")] = "counted",
    layer: Annotated[list[str] | None, typer.Option(help="SELECTOR=PATTERN that is set. Repeatable.")] = None,
    ignore: Ignore = None,
    values: Values = "fp32",
    calib: Calib = None,
    num_calibration_samples: CalibrationSamples = None,
    max_seq_length: MaxLength = None,
    text_columns: TextColumns = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a recipe for compile --recipe.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw what other budgets would give: a .png or .svg.")] = None,
    trust: Trust = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose patterns that meet a budget of speed, latency or density here, and lose the least."""
    with reporting(as_json):
        with starting(as_json):
            from sparsec import registry, search, store
            from sparsec.choosing.request import budget_of
            from sparsec.data import Deferred
            from sparsec.models import load_model
            from sparsec.recipe import Recipe
            from sparsec.shorthand import targets_of, values_of

        candidates = tuple(patterns.split(",")) if patterns else search.CANDIDATES
        stored, given = values_of(values), targets_of(None, layer, ignore)
        name, amount = budget_of(budget, speedup, latency, density)
        request = search.Request(
            name, amount, tokens, mode, objective, uniform, candidates, diversity, stored  # type: ignore[arg-type]
        )  # fmt: skip
        if out:
            store.check_file(out, "-o")
        if plot:
            from sparsec.errors import UsageError
            from sparsec.plot import check_plot

            if mode == "paper":
                raise UsageError("--plot draws choices at other budgets, and mode paper makes one; leave --plot out")
            check_plot(plot)
        source, _, _ = _model(model)
        asked: dict[str, Any] = {
            "calib": calib,
            "num_calibration_samples": num_calibration_samples,
            "max_seq_length": max_seq_length,
        }
        asked |= {"text_columns": text_columns.split(",") if text_columns else None}
        basis = {key: value for key, value in asked.items() if value is not None}
        basis |= {"model": source, "values": stored, "seed": seed}
        wanted = Recipe.from_data({**basis, "targets": given})
        set_threads(threads)
        loaded = load_model(source, seed, trust)
        program = loaded.program
        program = program.replace(sites=program.sites.with_targets(given)) if given else program
        data = Deferred(program, loaded.tools, wanted.data_request())
        with progress(as_json) as say:
            found = search.choose(
                program, registry.backend("kernel"), request, batches=lambda: data().batches, seed=seed, progress=say
            )
        made = Recipe.from_data({**basis, "targets": {**found.targets, **given}})
        if out:
            out.write_text(made.to_yaml())
        if plot:
            from sparsec.plot import save_front

            save_front(found.data, source, plot)
        if as_json:
            return print_json({**found.data, "recipe": made.model_dump(mode="json")})
        from sparsec import show_speed

        show_speed.choice(found)


def _model(text: str) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """MODEL, and the targets and included roles of an artifact's recipe."""
    from sparsec import store
    from sparsec.backend import FORMAT
    from sparsec.recipe import Recipe

    folder = Path(text)
    if not (folder / store.MANIFEST).is_file() or store.read_manifest(folder).get("format") != FORMAT:
        return text, {}, ()
    recipe = Recipe.read(folder / store.MANIFEST)
    return recipe.model, recipe.targets, recipe.include


def _load(name: str, trust: bool) -> Any:
    from sparsec.models import load_model

    return load_model(name, trust=trust).program
