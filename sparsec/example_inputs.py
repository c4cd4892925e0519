"""Small inputs of the right names and types, to trace a Hugging Face model with, as far as its configuration tells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsec.errors import TraceError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BATCH, _LENGTH = 2, 16
_SAMPLES = 16000  # a second of sound


def example(model: nn.Module, tokenizer: Any, location: str, seed: int) -> dict[str, Tensor]:
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


def sizes(name: str, value: Tensor) -> dict[int, str]:
    """Which axes of an input vary, and what their sizes are called."""
    if value.dim() != 2 or value.is_floating_point():
        return {0: "batch"}
    return {0: "batch", 1: "decoder_length" if name.startswith("decoder_") else "length"}
