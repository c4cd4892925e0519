"""Hugging Face models, loaded with the head that a task needs and traced. The only module that imports transformers."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsec import heads, text
from sparsec.data import Tools
from sparsec.errors import TraceError, UsageError
from sparsec.example_inputs import example, sizes
from sparsec.heads import Head
from sparsec.loaded import Loaded, with_random_samples
from sparsec.migrating import folders
from sparsec.recipe import DTYPES, Dtype
from sparsec.tracing import trace

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger("sparsec")
_DATA = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")  # of a hub's folder: no code, no pickles


def from_hub(location: str, name: str, seed: int, dtype: Dtype, head: Head | None, weights: str = "") -> Loaded:
    """Load and trace what lies in a folder, or on a hub; `name`: what it is called. See `models.load_model`."""
    given, location = location, readable(location, weights)
    model, new = _pretrained(location, name, DTYPES[dtype], head, seed, weights or (name if location != given else ""))
    tokenizer = _tokenizer(location, int(getattr(model.config, "vocab_size", 0) or 0))
    config: Any = model.config
    inputs = example(model, tokenizer, location, seed)
    inputs = {key: value.to(config.dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    dynamic = {key: sizes(key, value) for key, value in inputs.items()}
    longest = _longest(model, getattr(config, "text_config", config))
    names = {size for axes in dynamic.values() for size in axes.values()} - {"batch"}
    limits = dict.fromkeys(names, longest) if longest else {}
    origin = {"model": name, "folder": _folder(location), "config": _plain(config.to_diff_dict())}
    if head:
        origin["head"] = heads.settings(config)
    try:
        program = trace(model, inputs, dynamic, limits, origin)
    except TraceError as error:
        raise TraceError(f"{error}; as package.module:function only the batch varies") from error
    vocabulary = int(getattr(getattr(config, "text_config", config), "vocab_size", None) or 0) or None
    images = functools.partial(_image_processor, location) if "pixel_values" in inputs else None
    tools = Tools(tokenizer, images, vocabulary)
    if tokenizer is not None and "input_ids" in inputs:
        encoded = text.batches(tokenizer, list(inputs), count=8, length=min(64, longest or 64))
        return Loaded(program, encoded, "8 docstrings of the Python standard library, 64 tokens each", tools, new)
    return replace(with_random_samples(program, seed), tools=tools, head=new)


def readable(location: str, weights: str) -> str:
    """What transformers can read: the location, or a plain folder made of weights that another tool wrote."""
    folder = Path(location)
    if not folder.is_dir():
        if not weights and not folders.is_compressed(read_config(location).to_dict()):
            return location
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(location, allow_patterns=list(_DATA)))
    return str(folders.plain(folder, Path(weights) if weights else None))


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


def read_config(location: str) -> Any:
    """The configuration in a folder, or on a hub. Raises UsageError where there is none."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(location)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{location}: no model configuration could be read (neither here nor from a hub): {reason}"
        ) from error


def _pretrained(
    location: str, known_as: str, dtype: str, head: Head | None, seed: int, others: str = ""
) -> tuple[nn.Module, str]:
    """The model, and what of its head is new. `others`: where weights come from that another tool wrote."""
    import torch
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    config = read_config(location)
    names = getattr(config, "architectures", None) or []
    name = (heads.prepare(config, head, known_as) if head else None) or (names[0] if names else "AutoModel")
    cls: Any = getattr(transformers, name, None)
    if cls is None:
        raise UsageError(
            f"{location}: transformers {transformers.__version__} has no architecture {name!r} (config.json)"
        )
    options = {"config": config, "dtype": dtype, "output_loading_info": True}
    try:
        with torch.random.fork_rng(devices=[], enabled=head is not None):
            if head:
                torch.manual_seed(seed)
            model, info = cls.from_pretrained(location, **options, ignore_mismatched_sizes=bool(head and head.asked))
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise UsageError(f"{location}: the weights cannot be loaded: {str(error).splitlines()[0]}") from error
    own = "" if head is None else f"{model.base_model_prefix}."  # what a new head lacks is new
    if others and (absent := sorted(key for key in info["missing_keys"] if key.startswith(own))):
        unknown = ", ".join(sorted(info["unexpected_keys"])[:3])
        raise UsageError(
            f"{others}: {len(absent)} of the model's weights are not in it, the first is {absent[0]}"
            f"{f'; it holds {unknown}' if unknown else ''}: expected the weights of a {name}"
        )
    if head is None:
        return model, ""
    heads.settle(model)
    return model, heads.new_parts(head, info)


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


def _plain(value: Any) -> Any:
    """JSON data of a configuration; what JSON has no word for becomes text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
