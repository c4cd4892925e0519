"""Commands that predict speed: `explain` what a pattern would bring, `select` patterns for a speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsec.cli.terminal import Json, Threads, print_json, progress, reporting, set_threads

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
    values: Values = "fp32",
    measure: Annotated[bool, typer.Option("--measure", help="Time the kernels on each site's own shape.")] = False,
    sites: Annotated[bool, typer.Option("--sites", help="One line for every site.")] = False,
    trust: Trust = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say what would become sparse and how much faster it would be, before anything is pruned or trained."""
    with reporting(as_json):
        from sparsec import explain as job
        from sparsec import registry
        from sparsec.shorthand import targets_of, token_counts, values_of

        counts, stored, one = token_counts(tokens), values_of(values), registry.backend(backend)
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
    speedup: Annotated[float, typer.Option(help="How many times faster than dense the whole model shall be.")],
    tokens: Annotated[int, typer.Option(min=1, help="At this many tokens.")] = 128,
    uniform: Annotated[bool, typer.Option("--uniform", help="One pattern for all sites.")] = False,
    patterns: Annotated[str | None, typer.Option(help="Comma-separated candidates, such as 2:4,64:2:8.")] = None,
    ignore: Ignore = None,
    values: Values = "fp32",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Write a recipe for compile --recipe.")] = None,
    trust: Trust = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Choose patterns that make a model so many times faster here, and keep the most of its weights' score."""
    with reporting(as_json):
        from sparsec import registry, search
        from sparsec.recipe import Recipe
        from sparsec.shorthand import targets_of, values_of

        candidates = tuple(patterns.split(",")) if patterns else search.CANDIDATES
        stored, ignored = values_of(values), targets_of(None, None, ignore)
        set_threads(threads)
        name, _, _ = _model(model)
        program = _load(name, trust)
        with progress(as_json) as say:
            found = search.choose(
                program, registry.backend("kernel"), speedup, tokens,
                uniform=uniform, candidates=candidates, ignore=ignored, values=stored, progress=say,
            )  # fmt: skip
        made = Recipe.from_data({"model": name, "targets": found.targets, "values": stored})
        if out:
            out.write_text(made.to_yaml())
        if as_json:
            figures = {"tokens": found.tokens, "speed": found.speed, "retained": found.retained}
            recipe: dict[str, Any] = made.model_dump(mode="json")
            return print_json({**figures, "patterns": dict(found.patterns), "left": dict(found.left), "recipe": recipe})
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
