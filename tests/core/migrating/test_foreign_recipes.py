"""Recipes of llm-compressor and SparseML become sparsec's own, or an error that names what has no counterpart."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsec.errors import RecipeError
from sparsec.migrating.recipes import SUPPORTED, convert, is_foreign
from sparsec.recipe import Recipe
from sparsec.shorthand import recipe_of

SPARSEGPT, GRADUAL = "oneshot{solver=sparsegpt", "gradual{epochs=4, start=0.25, end=1}"
DOCUMENTED = """
test_stage:
  obcq_modifiers:
    SparseGPTModifier:
      sparsity: 0.5
      mask_structure: "2:4"
      dampening_frac: 0.001
      block_size: 128
      targets: ['Linear']
      ignore: ['re:.*lm_head']
"""


def one(name: str = "SparseGPTModifier", **options: Any) -> str:
    """A recipe of one stage with one modifier."""
    return yaml.safe_dump({"oneshot_stage": {"pruning_modifiers": {name: options}}})


def data(text: str) -> dict[str, Any]:
    assert is_foreign(text)
    return convert(text).data


def test_the_documented_recipe() -> None:
    made = convert(DOCUMENTED)

    assert {"targets": {"*": "2:4"}, "passes": "oneshot{solver=sparsegpt, damping=0.001}"} == made.data
    assert (
        "SparseGPTModifier: mask_structure 2:4 prunes 2 of 4; here that is 2:4, keep 2 of 4 (50 % zeros)" in made.notes
    )
    assert any("ignore re:.*lm_head is left out: heads stay dense here" in note for note in made.notes)


@pytest.mark.parametrize(
    "text",
    [
        "oneshot_modifiers:\n  SparseGPTModifier: {sparsity: 0.5, mask_structure: 2:4}",
        "modifiers:\n- !SparseGPTModifier\n  sparsity: 0.5\n  mask_structure: '2:4'",
        "modifiers:\n- SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4'}",
        '{"test_stage": {"obcq_modifiers": {"SparseGPTModifier": {"sparsity": 0.5, "mask_structure": "2:4"}}}}',
        "---\nversion: 1.1\nmodifiers:\n- !SparseGPTModifier {sparsity: 0.5, mask_structure: 2:4}\n---\n# Card\n",
        "sparsity_stage:\n  run_type: !!python/object/apply:llmcompressor.recipe.stage.StageRunType [oneshot]\n"
        "  a_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, mask_structure: '2:4', sequential_update: false}",
    ],
)
def test_every_form_of_a_recipe_is_read(text: str) -> None:
    assert {"targets": {"*": "2:4"}, "passes": "oneshot{solver=sparsegpt}"} == data(text)


@pytest.mark.parametrize(
    ("structure", "pattern", "said"),
    [("1:4", "3:4", "prunes 1 of 4; here that is 3:4, keep 3 of 4 (25 % zeros)"), ("6:8", "2:8", "keep 2 of 8")],
)
def test_the_number_pruned_becomes_the_number_kept_and_is_told(structure: str, pattern: str, said: str) -> None:
    made = convert(one(mask_structure=structure, sparsity=0.5))

    assert {"*": pattern} == made.targets
    assert any(said in note for note in made.notes)
    assert any("sparsity 0.5 changes nothing beside mask_structure" in note for note in made.notes)


@pytest.mark.parametrize("structure", ["0:0", "unstructured", None])
def test_no_structure_is_a_share_of_zeros(structure: str | None) -> None:
    assert {"*": "unstructured:0.7"} == data(one(mask_structure=structure, sparsity=0.7))["targets"]


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("WandaPruningModifier", {"sparsity": 0.5, "mask_structure": "2:4"}, "oneshot{solver=none}"),
        ("SparseGPTModifier", {"sparsity": 0.5, "percdamp": 0.1, "quantize": False}, f"{SPARSEGPT}, damping=0.1}}"),
        ("MagnitudePruningModifier", {"init_sparsity": 0.5, "final_sparsity": 0.5}, "mask | freeze"),
        ("GMPruningModifier", {"final_sparsity": 0.5, "start_epoch": 1, "end_epoch": 4}, GRADUAL),
        ("ConstantPruningModifier", {"targets": ["re:.*weight"], "start": 0}, "adopt"),
    ],
)  # fmt: skip
def test_every_modifier_has_its_pass(name: str, options: dict[str, Any], passes: str) -> None:
    assert passes == data(one(name, **options))["passes"]


def test_a_stage_that_trains_under_the_zeros_follows() -> None:
    text = one(sparsity=0.5, mask_structure="2:4") + (
        "finetuning_stage:\n  f_modifiers:\n    ConstantPruningModifier: {targets: ['re:.*q_proj.weight'], start: 0}\n"
        "  run_type: !!python/object/apply:llmcompressor.recipe.stage.StageRunType [train]\n"
    )

    assert "oneshot{solver=sparsegpt} | fixed-mask" == data(text)["passes"]


def test_epochs_of_a_range_are_those_that_train() -> None:
    text = (
        "modifiers:\n- !EpochRangeModifier {start_epoch: 0.0, end_epoch: 70.0}\n"
        "- !GMPruningModifier {start_epoch: 0, end_epoch: 35, update_frequency: 1.0, init_sparsity: 0.05, "
        "final_sparsity: 0.85, mask_type: unstructured, params: ['sections.0.conv1.weight']}"
    )
    made = data(text)

    assert "gradual{epochs=70, start=0, end=0.5}" == made["passes"]
    assert {r"re:^sections\.0\.conv1\.weight(?:\.|$)": "unstructured:0.85"} == made["targets"]


def test_zeros_that_were_grown_in_training_are_trained_under_already() -> None:
    text = (
        "modifiers:\n- !EpochRangeModifier {start_epoch: 0.0, end_epoch: 4}\n"
        "- !GMPruningModifier {start_epoch: 0, end_epoch: 2, init_sparsity: 0.05, final_sparsity: 0.8}\n"
        "- !ConstantPruningModifier {start_epoch: 2, params: __ALL_PRUNABLE__}"
    )
    transfer = (
        "modifiers:\n- !EpochRangeModifier {start_epoch: 0.0, end_epoch: 2.5}\n- !ConstantPruningModifier {start: 0}"
    )

    assert "gradual{epochs=4, start=0, end=0.5}" == data(text)["passes"]
    assert {"targets": {}, "passes": "adopt | fixed-mask{epochs=3}"} == data(transfer)


# Targets --------------------------------------------------------------------------------------------------------------

NAMES = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.10.mlp.up_proj.weight",
    "lm_head.weight",
    "model.layer_norm.weight",
)


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        ([r"re:model.layers.\d*$"], [], [0, 1]),
        ([r"re:model.layers.1$"], [], [0]),
        (["model.layers.1"], [], [0]),
        (["re:.*up_proj"], [], [1]),
        (["re:layers.1"], [], []),
        (["re:.*up_proj.weight", "lm_head"], [], [1, 2]),
        (["re:.*"], ["re:.*lm_head", "re:.*norm"], [0, 1]),
        ([r"re:.*_proj$"], ["model.layers.1"], [1]),
    ],
)
def test_expressions_mean_the_modules_they_meant(targets: list[str], ignore: list[str], expected: list[int]) -> None:
    selectors = data(one(mask_structure="2:4", targets=targets, ignore=ignore))["targets"]
    found = [i for i, name in enumerate(NAMES) if any(re.search(one.removeprefix("re:"), name) for one in selectors)]

    assert expected == found
    assert {"2:4"} == set(selectors.values())


def test_what_is_ignored_beside_a_class_stays_dense() -> None:
    made = convert(one(mask_structure="2:4", targets=["Linear"], ignore=["LayerNorm", "re:.*mlp.gate$", "lm_head"]))

    assert {"*": "2:4", r"re:^(?:.*mlp.gate)(?:\.|$)": "ignore"} == made.targets
    assert any("ignore LayerNorm is left out" in note for note in made.notes)


# What cannot be converted ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (one("QuantizationModifier", scheme="W8A8"), r"QuantizationModifier has no counterpart.*supported are Spar"),
        (one("SmoothQuantModifier", smoothing_strength=0.8), f"SmoothQuantModifier .*{', '.join(SUPPORTED)}"),
        (one(sparsity=0.5, sparsity_profile="owl"), r"option sparsity_profile \(found 'owl'\).*are dampening_frac"),
        (one(sparsity="eval(target)"), r"sparsity is 'eval\(target\)'; write the value itself"),
        (one(sparsity=[0.5, 0.6]), "sparsity is .*; expected one number"),
        (one(sparsity=1.5), "sparsity is '?1.5'?; expected one share of zeros between 0 and 1"),
        (one(), "sparsity is None; expected one share"),
        (one(mask_structure="4:4"), "mask_structure is '4:4'; expected N:M with 0 < N < M"),
        (one(mask_structure="block4"), "mask_structure is 'block4'"),
        (one(mask_structure="2:4", targets=["re:("]), r"'re:\(' is not a regular expression"),
        (one(mask_structure="2:4", targets=["Embedding"]), "has the class Embedding; sparsec prunes linear layers"),
        (one(mask_structure="2:4", targets=["Linear", "lm_head"]), "targets has the class Linear and names beside it"),
        (one(mask_structure="2:4", ignore=["Linear"]), "ignore is Linear, which is what is pruned"),
        (one(mask_structure="2:4", targets=3), "targets is 3; expected names"),
        ("test_stage:\n  pruning:\n    SparseGPTModifier: {sparsity: 0.5}", "'pruning' is neither a stage nor a group"),
        ("test_stage:\n  a_modifiers: [3]", "expected modifiers by name"),
        ("test_stage:\n  a_modifiers:\n    SparseGPTModifier: 3", "expected options by name, found 3"),
        ("test_stage: {}", "none of its modifiers prunes; expected one of SparseGPT"),
        (one(sparsity=0.5) + "b_stage:\n  a_modifiers:\n    WandaPruningModifier: {sparsity: 0.5}", "in one way"),
        ("test_stage:\n  a_modifiers:\n    SparseGPTModifier: {sparsity: 0.5, sparsity: 0.6}", "stands twice"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_named(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        convert(text)


# As a user gives it ---------------------------------------------------------------------------------------------------


def given(path: Path, text: str, model: str | None) -> Recipe:
    path.write_text(text)
    return recipe_of(model, *[None] * 3, False, path, *[None] * 5)


def test_a_recipe_is_read_as_any_other_and_told_in_our_own_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = given(tmp_path / "r.yaml", DOCUMENTED, "demo:minilm")

    assert {"*": "2:4"} == made.targets
    assert "passes: oneshot{solver=sparsegpt, damping=0.001}" in caplog.text
    assert "keep 2 of 4 (50 % zeros)" in caplog.text
    (tmp_path / "own.yaml").write_text(made.to_yaml())
    assert made == Recipe.read(tmp_path / "own.yaml")


def test_the_file_and_a_missing_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"r.yaml: model is missing"):
        given(tmp_path / "r.yaml", DOCUMENTED, None)
    with pytest.raises(RecipeError, match=r"recipe .*r.yaml, modifier GPTQModifier has no counterpart"):
        given(tmp_path / "r.yaml", one("GPTQModifier"), "demo:minilm")


def test_our_own_recipes_are_not_taken_for_theirs() -> None:
    own = Recipe(model="net", targets={"*": "2:4", "re:stage": "ignore"}, passes="mask | freeze")

    assert not is_foreign(own.to_yaml())
