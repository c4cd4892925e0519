"""What `sparsec compile --dry-run` prints above the recipe: the steps it would take, in words."""

from __future__ import annotations

from pathlib import Path

from sparsec.recipe import WITH_DATA, WITHOUT_DATA, Recipe


def plan(recipe: Recipe, out: Path) -> str:
    """The steps as YAML comments, so that all of what is printed is a recipe still. Loads nothing."""
    passes = recipe.passes or f"{WITH_DATA} where there are calibration data for the model, else {WITHOUT_DATA}"
    steps = [f"load {recipe.model} and trace it", f"sites: {_sites(recipe)}", f"passes: {passes}"]
    if recipe.calib:
        steps.append(f"calibrate on {recipe.num_calibration_samples} samples of {recipe.calib}")
    if recipe.train:
        steps.append(f"train on {recipe.train}")
    if recipe.eval:
        steps.append(f"judge on {recipe.eval}")
    steps.append(f"write {out} for {', '.join(recipe.backends)}; prove it from disk; measure quality and speed")
    lines = ["Nothing was loaded or written. compile would:", *(f"{i}. {one}" for i, one in enumerate(steps, 1))]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


def _sites(recipe: Recipe) -> str:
    """`* gets 2:4, re:fc1 is left dense`."""
    said = [
        f"{name} {'is left dense' if text == 'ignore' else f'gets {text}'}" for name, text in recipe.targets.items()
    ]
    return ", ".join(said) or "as the passes or the model say"
