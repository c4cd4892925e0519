"""What `compile` refuses, as early as it can: before the model is loaded, before the first pass, before writing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsec import registry, sources, store
from sparsec.backend import Backend
from sparsec.errors import UsageError
from sparsec.pipeline import PassManager
from sparsec.program import Program
from sparsec.recipe import DTYPES, Recipe, make_backend


def check_request(recipe: Recipe, out: Path, force: bool) -> list[Backend]:
    """All that can be refused before the model is loaded."""
    from sparsec.pattern import Pattern

    for text in recipe.targets.values():
        if text != "ignore":
            Pattern.parse(text)
    if recipe.passes:
        PassManager.parse(recipe.passes).check_order({"traced"})
    sources.check(recipe.calib)
    chosen = [make_backend(text) for text in dict.fromkeys(recipe.backends)]
    for one in chosen:
        if reason := one.unavailable():
            raise UsageError(f"backend {one.name} cannot be used here: {reason}")
        if recipe.values not in one.stores:
            raise UsageError(
                f"backend {one.name} stores {' or '.join(one.stores)} weights, found --values {recipe.values}; "
                f"leave {one.name} out of --backend, or leave out --values"
            )
    if recipe.values != "fp32" and recipe.dtype != "fp32":
        raise UsageError(
            f"--values {recipe.values} rounds the sparse weights of a float32 model; with --dtype {recipe.dtype} they "
            "are stored as they are: leave one of the two out"
        )
    if recipe.values == "int8" and (recipe.drop_slow or recipe.tokens):
        raise UsageError(
            f"{'--drop-slow' if recipe.drop_slow else '--tokens'} compares with a dense kernel, and none computes what "
            "int8 weights do (their activations are rounded too); leave it out, or use --values bf16"
        )
    names = [one.name for one in chosen]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"backend {twice} is asked for twice, with different options; an artifact holds it once")
    if not chosen:
        raise UsageError("no backend was asked for; expected at least one of " + ", ".join(registry.backend_table()))
    store.check_writable(out, force)
    return chosen


def check_program(program: Program, recipe: Recipe, backends: Sequence[Backend]) -> None:
    """All that can be refused before patterns are given to sites."""
    check_backends(program, backends)
    types = {str(parameter.dtype) for parameter in program.module.parameters() if parameter.is_floating_point()}
    if recipe.dtype != "fp32" and (wanted := f"torch.{DTYPES[recipe.dtype]}") not in types:
        raise UsageError(
            f"--dtype {recipe.dtype} is for Hugging Face models, which are loaded in it; {recipe.model} is traced "
            f"as it is, with {', '.join(sorted(types)).replace('torch.', '')} weights: cast it to {wanted} before"
        )


def check_backends(program: Program, backends: Sequence[Backend]) -> None:
    """What a backend has against a program; asked again once its sites have patterns."""
    for one in backends:
        if reason := one.refuses(program):
            raise UsageError(f"backend {one.name} cannot write this model: {reason}")


def check_pruned(program: Program, allow_dense: bool) -> None:
    """What no backend could write."""
    if program.facts & {"masked", "lowered"} or "frozen" not in program.facts:
        raise UsageError(
            "after its passes the program must be frozen, not lowered (backends lower it themselves): end with `freeze`"
        )
    if not allow_dense:
        program.sites.refuse_silent()
