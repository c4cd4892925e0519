"""Pass text and recipes read back as what they print, and every mistake is named."""

from __future__ import annotations

import dataclasses
import doctest
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from models import Residual, made, random

from sparsec import recipe as recipe_module
from sparsec import registry, trace
from sparsec.columns import SOLVERS
from sparsec.errors import RecipeError, UsageError
from sparsec.passes.freeze import Freeze
from sparsec.passes.lower import Lower
from sparsec.passes.mask import Mask
from sparsec.pipeline import Pass, PassManager, quote
from sparsec.recipe import Recipe, make_backend, make_pass, parse_passes
from sparsec.shorthand import recipe_of

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    ' ,{}|="\\\t\n\r\x0b\x1f\x85\xa0\u2003ab', max_size=8
)


@dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "everything"

    text: str = "default"
    count: int = 1
    share: float = 0.5
    flag: bool = False
    kind: Literal["a", "b"] = "a"


@pytest.fixture(autouse=True)
def _everything_is_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    known = recipe_module.pass_class
    monkeypatch.setattr(recipe_module, "pass_class", lambda name: Everything if name == "everything" else known(name))


# Pass text ------------------------------------------------------------------------------------------------------------


@given(text=ANY_TEXT)
def test_any_text_survives_quoting(text: str) -> None:
    assert (Mask(pattern=text), Freeze()) == parse_passes(f"mask{{pattern={quote(text)}}} | freeze")


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "text": ANY_TEXT,
            "count": st.integers(),
            "share": st.floats(allow_nan=False),
            "flag": st.booleans(),
            "kind": st.sampled_from(["a", "b"]),
        },
    )
)
def test_a_pass_reads_back_from_its_text(options: dict[str, Any]) -> None:
    one = Everything(**options)

    assert (one,) == parse_passes(str(one))


@given(columns=st.sampled_from(SOLVERS), pattern=ANY_TEXT, more=st.lists(st.sampled_from([Freeze(), Lower()])))
def test_a_list_of_passes_reads_back_from_its_text(columns: Any, pattern: str, more: list[Pass]) -> None:
    passes = (Mask(pattern=pattern, columns=columns), *more)
    text = str(PassManager(passes))

    assert passes == parse_passes(text)
    assert text == str(PassManager.parse(text))


@pytest.mark.parametrize(
    "text",
    [
        "mask{pattern=2:4,columns=l1}|freeze",
        " mask { pattern = 2:4 , columns = l1 } | freeze ",
        'mask{pattern="2:4", columns="l1"}\n|\nfreeze',
    ],
)
def test_space_and_quotes_do_not_matter(text: str) -> None:
    assert (Mask(pattern="2:4", columns="l1"), Freeze()) == parse_passes(text)


def test_options_at_their_defaults_are_not_printed() -> None:
    assert "mask" == str(Mask(columns="greedy"))
    assert "mask{pattern=64:2:5, columns=l1}" == str(Mask("64:2:5", columns="l1"))
    assert "freeze" == str(Freeze())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a pass, found 'the end'"),
        ("   ", "expected the name of a pass, found 'the end'"),
        ("mask |", "expected the name of a pass, found 'the end'"),
        ("| mask", "expected the name of a pass, found '|'"),
        ("mask || freeze", "expected the name of a pass, found '|'"),
        ('"mask"', "expected the name of a pass, found 'mask'"),
        ("mask freeze", "expected '|' or the end after mask, found 'freeze'"),
        ("mask}", "expected '|' or the end after mask, found '}'"),
        ("mask{} freeze", "expected '|' or the end after mask, found 'freeze'"),
        ("mask{", "{key=value, ...}"),
        ("mask{score}", "found 'score'"),
        ("mask{score=}", "option score of mask has no value"),
        ("mask{score=", "option score of mask has no value"),
        ("mask{=magnitude}", "found '='"),
        ("mask{,}", "found ','"),
        ('mask{"score"=magnitude}', "found 'score'"),
        ("mask{score=magnitude", "expected ',' or '}' in the options of mask, found 'the end'"),
        ("mask{score=magnitude columns=l1}", "expected ',' or '}' in the options of mask, found 'columns'"),
        ("mask{score=magnitude, score=magnitude}", "option score of mask is given twice"),
        ('mask{score="magnitude}', "cannot read"),
        ("mask{score=a\\b}", "cannot read"),
    ],
)
def test_a_syntax_error_says_what_was_found(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_passes(text)

    assert message in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "near"), [("masks", "mask"), ("freez", "freeze"), ("Mask", "mask"), ("lowr", "lower")]
)
def test_an_unknown_pass_gets_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown pass '{name}'; did you mean {near}"):
        parse_passes(name)


def test_an_unknown_pass_that_is_near_nothing_gets_the_list() -> None:
    with pytest.raises(RecipeError, match=f"unknown pass 'quantize'; there are {', '.join(registry.passes())}$"):
        parse_passes("quantize")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask{scor=magnitude}", "pass mask: there is no option 'scor'"),
        ("mask{name=x}", "pass mask: there is no option 'name'"),
        ("freeze{pattern=2:4}", "pass freeze: there is no option 'pattern'"),
        ("mask{columns=best}", "pass mask: columns: .*'l1', 'l2', 'greedy' or 'exact'; found 'best'"),
        ("mask{score=luck}", "pass mask: score: .*'magnitude', 'wanda', .*found 'luck'"),
        ("oneshot{solver=luck}", "pass oneshot: solver: .*'alps'.*found 'luck'"),
        ("everything{count=many}", "pass everything: count: .*integer.*found 'many'"),
        ("everything{count=1.5}", "pass everything: count: .*found '1.5'"),
        ("everything{share=half}", "pass everything: share: .*number.*found 'half'"),
        ("everything{flag=maybe}", "pass everything: flag: .*boolean.*found 'maybe'"),
    ],
)
def test_a_wrong_option_is_named_with_what_was_found(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_passes(text)


def test_text_becomes_the_type_of_the_option() -> None:
    expected = Everything(text="1", count=-3, share=1e-3, flag=True, kind="b")

    assert (expected,) == parse_passes("everything{text=1, count=-3, share=0.001, flag=true, kind=b}")
    assert expected == make_pass("everything", dataclasses.asdict(expected))


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(recipe_module)

    assert result.attempted >= 1
    assert result.failed == 0


# Recipes --------------------------------------------------------------------------------------------------------------

SMALL = {"model": "demo:minilm", "targets": {"*": "64:2:5"}}
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@given(
    recipe=st.builds(
        Recipe,
        model=texts,
        targets=st.dictionaries(texts, st.sampled_from(["64:2:5", "2:4", "ignore"])),
        include=st.lists(texts).map(tuple),
        passes=st.sampled_from(["mask | freeze", "mask{columns=l1} | freeze", 'mask{pattern="a b"}']),
        backends=st.lists(st.sampled_from(["kernel", "onnx"])).map(tuple),
        seed=st.integers(0, 2**63 - 1),
    )
)
def test_a_recipe_reads_back_from_its_yaml(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    again = Recipe.read(path)

    assert recipe == again
    assert list(recipe.targets) == list(again.targets), "later targets win, so the order counts"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("text", ["2:4", "64:2:5", "10:20", "1:4", "unstructured:0.7"])
def test_a_pattern_in_yaml_needs_no_quotes(text: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"model: net\nseed: 7\ntargets:\n  '*': {text}\n  re:fc1: {text}\n")

    assert {"*": text, "re:fc1": text} == Recipe.read(path).targets
    assert 7 == Recipe.read(path).seed


def test_a_manifest_is_a_recipe(tmp_path: Path) -> None:
    recipe = Recipe(**SMALL)
    path = written(
        tmp_path, json.dumps({"format": "x", "recipe": recipe.model_dump(mode="json"), "files": {}}, indent=1)
    )

    assert recipe == Recipe.read(path)


def test_defaults_are_filled_in_and_passes_are_brought_into_one_form() -> None:
    recipe = Recipe.from_data({**SMALL, "passes": "mask{ columns=greedy }|freeze"})

    assert ("mask | freeze", ("kernel",), "fp32", 0) == (recipe.passes, recipe.backends, recipe.dtype, recipe.seed)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"targets": {}}, "where: model is missing"),
        ({"model": "net"}, "where: targets is missing"),
        ({**SMALL, "pases": "mask"}, "where: there is no option 'pases'"),
        ({**SMALL, "seed": "x"}, "where: seed: .*found 'x'"),
        ({**SMALL, "dtype": "int3"}, "where: dtype: .*found 'int3'"),
        ({**SMALL, "values": "int4"}, "where: values: .*found 'int4'"),
        ({**SMALL, "targets": ["2:4"]}, "where: targets: "),
        ({**SMALL, "targets": {"*": 3}}, r"where: targets\.\*: .*found 3"),
        ({**SMALL, "passes": "masks"}, "unknown pass 'masks'; did you mean mask"),
        (None, "where: value: .*found None"),
        ([SMALL], "where: value: "),
        ("mask | freeze", "where: value: "),
    ],
)
def test_a_wrong_recipe_is_refused_by_key(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_data(data, "where")


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\t- x", "*: 2:4"])
def test_what_is_not_yaml_is_refused_in_one_paragraph(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml is not YAML") as caught:
        Recipe.read(written(tmp_path, text))

    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00model")

    with pytest.raises(RecipeError, match="is not YAML"):
        Recipe.read(tmp_path / "recipe.yaml")


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml cannot be read: No such file"):
        Recipe.read(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        ("!!python/object/apply:os.system ['touch owned']", "!!python/object/apply:os.system"),
        ("!!python/name:os.system", "!!python/name:os.system"),
        ("!!python/object:sparsec.Recipe {}", "!!python/object:sparsec.Recipe"),
        ("!pattern 2:4", "!pattern"),
    ],
)
@pytest.mark.parametrize("key", ["model: net\ntargets", "model"])
def test_yaml_tags_make_no_objects(value: str, tag: str, key: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, f"# a recipe\n{key}: {value}\n")

    with pytest.raises(RecipeError, match="nothing was run") as caught:
        Recipe.read(path)
    line = 1 + path.read_text().splitlines().index(f"{key}: {value}".splitlines()[-1])
    assert f"recipe.yaml, line {line}: found the YAML tag {tag};" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"line 4: the key 're:fc1' stands twice; the first one would be lost"):
        Recipe.read(written(tmp_path, "model: net\ntargets:\n  re:fc1: 2:4\n  re:fc1: 2:8\n"))


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "seed: " + "9" * 5000, "a: &a [x]\n" + "".join(f"k{i}: &k{i} [{'*a, ' * 9}*a]\n" for i in range(9))],
    ids=["deep", "long number", "aliases"],
)
def test_a_yaml_bomb_is_refused_in_one_short_paragraph(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.read(written(tmp_path, text))

    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


def test_an_alias_within_an_alias_is_not_written_out(tmp_path: Path) -> None:
    levels = "".join(f"  - &l{i + 1} [{f'*l{i}, ' * 9}]\n" for i in range(12))

    with pytest.raises(RecipeError) as caught:
        Recipe.read(written(tmp_path, f"model: net\ntargets:\n  - &l0 [x]\n{levels}"))
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"re:(": "2:4"}, r"target 're:\(' is not a regular expression: missing \), unterminated subpattern"),
        ({"re:fc1": "2:4", "re:*": "ignore"}, "target 're:\\*' is not a regular expression: nothing to repeat"),
        ({"re:fc1": "4:2"}, "target 're:fc1': .*4:2"),
    ],
)
def test_a_target_is_checked_before_any_model_is_loaded(targets: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe(model="net", targets=targets)


def test_a_name_with_marks_is_no_regular_expression() -> None:
    assert {"fc1(": "2:4"} == Recipe(model="net", targets={"fc1(": "2:4"}).targets


def test_later_targets_win_and_regular_expressions_choose_layers() -> None:
    recipe = Recipe(model="net", targets={"*": "2:4", "re:down": "3:2:5", "up.weight": "ignore"})
    sites = trace(made(Residual), (random(2, 5),)).sites.with_targets(recipe.targets)

    assert ["None", "3:2:5"] == [str(site.pattern) for site in sites]
    with pytest.raises(UsageError, match=r"'re:dwn' .* matches none of the 2 sites"):
        sites.with_targets({"*": "2:4", "re:dwn": "2:8"})


@pytest.mark.parametrize("seed", [-1, 2**63, 2**80])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(RecipeError, match="seed: "):
        Recipe.from_data({**SMALL, "seed": seed})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe(**SMALL).seed = 1  # type: ignore[misc]


def test_the_yaml_is_plain() -> None:
    assert SMALL["targets"] == yaml.safe_load(Recipe(**SMALL).to_yaml())["targets"]


def test_a_backend_takes_options_as_a_pass_does() -> None:
    assert "packed" == make_backend("onnx").weights  # type: ignore[attr-defined]
    assert "dense" == make_backend("onnx{ weights = dense }").weights  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("onnx{weights=pakced}", "weights: Input should be 'packed' or 'dense'; found 'pakced'"),
        ("onnx{zeros=1}", "there is no option 'zeros' (its options: weights, form)"),
        ("onnx{form=matmul}", "form=matmul is for dense weights, which weights=packed has not; add weights=dense"),
        ("kernel{fast=1}", "there is no option 'fast' (its options: none)"),
        ("onnx{", "backend text 'onnx{'"),
        ("onnx}", "expected the end after onnx"),
        ("", "expected the name of a backend"),
    ],
)
def test_a_wrong_backend_text_is_named(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        make_backend(text)


def test_onnx_weights_is_shorthand_for_the_option_of_the_backend() -> None:
    made = recipe_of("m", "2:4", *[None] * 2, False, *[None] * 4, "kernel,onnx", None, onnx_weights="packed")  # type: ignore[arg-type]

    assert ("kernel", "onnx{weights=packed}") == made.backends
    other = recipe_of("m", "2:4", *[None] * 2, False, *[None] * 4, "onnx{form=matmul}", None, onnx_weights="dense")  # type: ignore[arg-type]
    assert ("onnx{weights=dense, form=matmul}",) == other.backends
    with pytest.raises(UsageError, match="add --backend kernel,onnx"):
        recipe_of("m", "2:4", *[None] * 2, False, *[None] * 4, "kernel", None, onnx_weights="packed")  # type: ignore[arg-type]
