"""The dense weights that an artifact does not hold, read again from the model that its recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sparsec.errors import UsageError
from sparsec.models import load_model
from sparsec.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def weights(manifest: Mapping[str, Any], trust: bool = False) -> dict[str, Tensor]:
    """By name, the weights of the sparse sites that the model has in the same shape, (batch, rows, cols).

    Raises UsageError where the model cannot be loaded, or is another one: it has none of them.
    """
    recipe = Recipe.from_data(manifest["recipe"])
    try:
        program = load_model(recipe.model, recipe.seed, trust, recipe.dtype, weights=recipe.weights).program
    except UsageError as error:
        raise UsageError(f"--before: the model that was compiled cannot be read: {error}") from error
    dense = {site.name: site.read(program.module) for site in program.sites}
    wanted = {site["name"]: tuple(site["shape"]) for site in manifest["sites"] if site["pattern"]}
    found = {name: dense[name] for name, shape in wanted.items() if name in dense and dense[name].shape == shape}
    if not found:
        raise UsageError(
            f"--before: {recipe.model} has none of the {len(wanted)} sparse weights by name and shape, so it is not "
            "the model that was compiled; leave --before out"
        )
    return found
