"""Recipes: everything that made an artifact, as text that makes it again.

Pass text: `mask{pattern=64:2:5, score=magnitude} | freeze`. A value with a space or one of `,{}|="\\` is double-quoted.
A recipe file is YAML (JSON is YAML); unknown keys are errors. An artifact's manifest holds its recipe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic

from sparsec.cost import TokenRange
from sparsec.data import LENGTH, SAMPLES, Request
from sparsec.errors import PatternError, RecipeError, UsageError
from sparsec.layout import Values
from sparsec.migrating.recipes import is_foreign, read_foreign
from sparsec.pattern import Pattern
from sparsec.pipeline import Pass
from sparsec.registry import backend, backend_class, pass_class, passes
from sparsec.strict_yaml import strict_loader

if TYPE_CHECKING:
    from sparsec.backend import Backend

_TOKEN = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,{}|="\\]+)|([,{}|=]))')
DEFAULT_PASSES = ""
"""Decided when the model is loaded: WITH_DATA where there is calibration data for it, else WITHOUT_DATA."""
WITH_DATA, WITHOUT_DATA = "oneshot", "mask | freeze"
PERMUTE = "permute"
Dtype = Literal["fp32", "bf16", "fp16"]
Head = Literal["sequence-classification", "image-classification", "regression", "causal-lm"]
"""The kinds of head that a task gives a Hugging Face model."""
Task = Literal["", "sequence-classification", "image-classification", "regression", "causal-lm", "none"]
"""What is trained for; empty: what the data say. none: no labels, only a teacher."""
DTYPES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""As torch and transformers call them."""
_SHORT = reprlib.Repr()  # aliases of aliases in YAML could be written out without end
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class Recipe(pydantic.BaseModel):
    """What to compile, to which patterns, by which passes, for which backends."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)

    model: str
    weights: str = ""
    """A file, safetensors or a state dict that torch.save wrote, whose weights take the place of the model's."""
    targets: dict[str, str]
    """Selector -> pattern or `ignore`, in order; later ones win (see SiteTable.with_targets)."""
    include: tuple[str, ...] = ()
    """Roles that are excluded by default and should not be."""
    passes: str = DEFAULT_PASSES
    backends: tuple[str, ...] = ("kernel",)
    """Names, with options in braces where a backend has some: `onnx{weights=dense}`."""
    dtype: Dtype = "fp32"
    """What a Hugging Face model is loaded as, before it is traced: a traced program is never cast."""
    values: Values = "fp32"
    """How the kernel backend stores sparse weights; passes work on `dtype`, and other backends store that."""
    tokens: str = ""
    """How many vectors a layer is expected to see in one call, such as `1-512`: where the kernel backend predicts that
    dense is faster, dense it is. Empty: not declared, sparse kernels run everywhere."""
    drop_slow: bool = False
    """Leave sites dense that would run no faster sparse (at `tokens`, or 1-512); `compile` resolves it to targets."""
    seed: int = pydantic.Field(0, ge=0, lt=2**63)  # what torch's generators take
    calib: str = ""
    """DATA of the passes that look at activations; empty: docstrings of the standard library. See `sparsec.sources`."""
    num_calibration_samples: int = pydantic.Field(SAMPLES, gt=0)
    max_seq_length: int = pydantic.Field(LENGTH, gt=0)
    text_columns: tuple[str, ...] = ()
    """The column with the text, or two for pairs; empty: the usual names are looked for."""
    train: str = ""
    """DATA of the passes that train; see `sparsec.training.labelled`."""
    eval: str = ""
    """DATA on which the dense and the sparse model are judged by the task's metrics, never trained on."""
    label_column: str = ""
    """The column with the label; empty: the usual names are looked for."""
    bias: Literal["", "columns", "overlap"] = ""
    """Where losses against a bias get a bias model's answers from; empty: columns. See `sparsec.training.bias`."""
    task: Task = ""
    """Gives a Hugging Face model the head of this task before it is traced; empty: the model's own is kept."""

    @pydantic.field_validator("targets")
    @classmethod
    def _targets_parse(cls, targets: dict[str, str]) -> dict[str, str]:
        for selector, text in targets.items():
            try:
                re.compile(selector.removeprefix("re:") if selector.startswith("re:") else "")
                if text != "ignore":
                    Pattern.parse(text)
            except re.error as error:
                raise RecipeError(f"target {selector!r} is not a regular expression: {error}") from None
            except PatternError as error:
                raise PatternError(f"target {selector!r}: {error}") from None
        return targets

    @pydantic.field_validator("passes")
    @classmethod
    def _passes_parse(cls, text: str) -> str:
        return " | ".join(map(str, parse_passes(text))) if text else DEFAULT_PASSES

    @pydantic.field_validator("backends")
    @classmethod
    def _backends_parse(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        for text in texts:
            name_and_options(text, "backend")
        return texts

    @pydantic.field_validator("tokens")
    @classmethod
    def _tokens_parse(cls, text: str) -> str:
        return str(TokenRange.parse(text)) if text else ""

    def data_request(self) -> Request:
        """The calibration data that it asks for."""
        return Request(self.calib, self.num_calibration_samples, self.max_seq_length, self.text_columns, self.seed)

    @staticmethod
    def read(path: Path, model: str | None = None) -> Recipe:
        """Read a recipe file, or the recipe in an artifact's manifest.json. Raises RecipeError with key and reason.

        A recipe of llm-compressor or SparseML is turned into one of ours, which is logged. `model`: in place of the
        file's; theirs name none.
        """
        import yaml

        try:
            text = path.read_text()
            data = read_foreign(text, path) if is_foreign(text) else yaml.load(text, strict_loader())  # a SafeLoader
        except OSError as error:
            raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error
        except RecipeError as error:
            raise RecipeError(f"recipe {path}, {error}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or a number beyond reason
            raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
        if isinstance(data, dict) and "recipe" in data:
            data = data["recipe"]
        if model and isinstance(data, dict):
            data = {**data, "model": model}
        return Recipe.from_data(data, str(path))

    @staticmethod
    def from_data(data: Any, where: str = "recipe") -> Recipe:
        """Check plain data. Raises RecipeError naming key and reason."""
        try:
            return Recipe.model_validate(data)
        except pydantic.ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error)}") from None

    def to_yaml(self) -> str:
        """The recipe as YAML that `read` accepts."""
        import yaml

        text: str = yaml.safe_dump(json.loads(self.model_dump_json()), sort_keys=False)
        return text


def parse_passes(text: str) -> tuple[Pass, ...]:
    """Read pass text; raises RecipeError for a syntax error, an unknown pass or option, or a wrong value.

    >>> [str(one) for one in parse_passes("mask{ columns=l1 }|freeze")]
    ['mask{columns=l1}', 'freeze']
    """
    tokens = _tokens(text)
    passes = []
    while True:
        kind, name = next(tokens)
        if kind != "word":
            raise RecipeError(f"pass text {text!r}: expected the name of a pass, found {name or 'the end'!r}")
        kind, mark = next(tokens)
        options: dict[str, str] = {}
        if mark == "{" and kind == "mark":
            options = _options(tokens, text, name)
            kind, mark = next(tokens)
        passes.append(make_pass(name, options))
        if kind == "end":
            return tuple(passes)
        if (kind, mark) != ("mark", "|"):
            raise RecipeError(f"pass text {text!r}: expected '|' or the end after {name}, found {mark!r}")


def make_pass(name: str, options: dict[str, Any]) -> Pass:
    """A pass from its name and options, text coerced to the types of its fields."""
    cls = pass_class(name)
    try:
        return pydantic.TypeAdapter(cls).validate_python(options)
    except pydantic.ValidationError as error:
        known = ", ".join(field.name for field in dataclasses.fields(cls)) or "none"
        raise RecipeError(f"pass {name}: {_explain(error)} (its options: {known})") from None


def make_backend(text: str) -> Backend:
    """A backend from its name and options, such as `onnx{weights=dense}`. Raises UsageError or RecipeError."""
    name, options = name_and_options(text, "backend")
    if not options:
        return backend(name)
    cls = backend_class(name)
    fields: list[str] = [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
    if unknown := [key for key in options if key not in fields]:
        raise RecipeError(
            f"backend {name}: there is no option {unknown[0]!r} (its options: {', '.join(fields) or 'none'})"
        )
    try:
        return pydantic.TypeAdapter(cls).validate_python(options)
    except pydantic.ValidationError as error:
        raise RecipeError(f"backend {name}: {_explain(error)} (its options: {', '.join(fields)})") from None


def name_and_options(text: str, what: str) -> tuple[str, dict[str, str]]:
    """`onnx{weights=dense}` as a name and options; `what` it names, in words. Raises RecipeError for a syntax error."""
    tokens = _tokens(text, what)
    kind, name = next(tokens)
    if kind != "word":
        raise RecipeError(f"{what} text {text!r}: expected the name of a {what}, found {name or 'the end'!r}")
    kind, mark = next(tokens)
    options: dict[str, str] = {}
    if (kind, mark) == ("mark", "{"):
        options = _options(tokens, text, name, what)
        kind, mark = next(tokens)
    if kind != "end":
        raise RecipeError(f"{what} text {text!r}: expected the end after {name}, found {mark!r}")
    return name, options


def passes_that_establish(fact: str) -> list[str]:
    """The names of the passes that make a program `fact`, those that need most of it first.

    One that cannot be loaded is left out.
    """
    found = {}
    for name in passes():
        with contextlib.suppress(UsageError):
            cls = pass_class(name)
            if fact in cls.establishes:
                found[name] = len(cls.requires - {"traced"})
    return sorted(found, key=lambda name: -found[name])


def _explain(error: pydantic.ValidationError) -> str:
    """The first problem as `key: what is wrong, found what`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "value"
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no option {key!r}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{key} is missing"
    return f"{key}: {first['msg'].removeprefix('Value error, ')}; found {_SHORT.repr(first['input'])}"


def _options(tokens: Any, text: str, name: str, what: str = "pass") -> dict[str, str]:
    options: dict[str, str] = {}
    kind, key = next(tokens)
    while (kind, key) != ("mark", "}"):
        if kind != "word" or next(tokens) != ("mark", "="):
            raise RecipeError(f"{what} text {text!r}: options of {name} are written {{key=value, ...}}; found {key!r}")
        if key in options:
            raise RecipeError(f"{what} text {text!r}: option {key} of {name} is given twice")
        kind, value = next(tokens)
        if kind not in ("word", "quoted"):
            raise RecipeError(f"{what} text {text!r}: option {key} of {name} has no value")
        options[key] = value
        kind, key = next(tokens)
        if (kind, key) == ("mark", ","):
            kind, key = next(tokens)
        elif (kind, key) != ("mark", "}"):
            raise RecipeError(
                f"{what} text {text!r}: expected ',' or '}}' in the options of {name}, found {key or 'the end'!r}"
            )
    return options


def _tokens(text: str, what: str = "pass") -> Any:
    position = 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if not match:
            raise RecipeError(f"{what} text {text!r}: cannot read {text[position:].strip()[:20]!r}")
        quoted, word, mark = match.groups()
        if quoted is not None:
            yield "quoted", re.sub(r"\\(.)", r"\1", quoted)
        else:
            yield ("word", word) if word else ("mark", mark)
        position = match.end()
    while True:
        yield "end", ""
