"""The transformers model of a folder: its names and shapes without weights, and itself. Imports transformers late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsec.errors import ArtifactError
from sparsec.program import bind
from sparsec.tracing import outputs_by_name

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Skeleton:
    """What a model's state holds."""

    shapes: dict[str, tuple[int, ...]]
    """By the one name that tied tensors are stored under, in the model's order."""
    names: dict[str, tuple[str, ...]]
    """Stored name -> all names of this tensor, itself among them."""


def skeleton(folder: Path, class_name: str, head: Mapping[str, Any]) -> Skeleton:
    """The state of the model that a folder's configuration describes; its weights are not read.

    `head`: what the configuration says of a head that the folder does not hold.
    """
    cls, config = _class(class_name), _config(folder)
    config.update(dict(head))
    with torch.device("meta"):
        model = cls(config)
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})  # name -> the one that is stored
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    names, shapes = {}, {}
    for group in groups.values():
        stored = next((name for name in group if name not in tied), group[0])
        names[stored], shapes[stored] = tuple(group), tuple(model.state_dict()[stored].shape)
    return Skeleton(shapes, names)


def pretrained(folder: Path, class_name: str, dtype: str) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, in eval mode, and what transformers says of its loading.

    Raises ArtifactError where it cannot be loaded.
    """
    from safetensors import SafetensorError

    cls, config = _class(class_name), _config(folder)
    try:
        with _quiet():
            model, loading = cls.from_pretrained(
                str(folder), config=config, dtype=dtype, output_loading_info=True, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), dict(loading)


def _class(name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None)
    if cls is None:
        raise ArtifactError(f"transformers {transformers.__version__} has no class {name}; install one that has")
    return cls


def _config(folder: Path) -> Any:
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{folder}: config.json cannot be read: {str(error).splitlines()[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars and warnings of transformers: what it would say is checked."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


class HfModule(torch.nn.Module):
    """The folder's model as artifacts are called: inputs by position or name -> outputs by name."""

    def __init__(self, model: Any, manifest: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.manifest = model, manifest
        self.input_names = [entry["name"] for entry in manifest["inputs"]]

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        """Run the model."""
        inputs = dict(zip(self.input_names, bind(self.input_names, args, kwargs), strict=True))
        found = outputs_by_name(self.model(**inputs), [])
        return {name: found[name] for name in self.manifest["outputs"] if name in found}
