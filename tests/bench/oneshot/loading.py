"""A model folder as a transformers model, float32, ready for inference; the same in every environment."""

from __future__ import annotations

from typing import Any


def load_model(folder: str) -> Any:
    """The architecture that config.json names."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    return cls.from_pretrained(folder, dtype=torch.float32).eval()
