"""`attach`: an artifact's kernels in the Hugging Face model itself, so that `generate` and pipelines have a KV cache.

1. Every parameter and buffer of the artifact must be in the model, by name, shape and dtype, and every parameter that
   the model computes with must be in the artifact: else nothing is changed.
2. All of them are put in, not only sparse weights: after training or a permutation, norms, biases and embeddings differ
   too. What is equal is shared. A layer that is a plain product gets a kernel; any other weight is unpacked, with the
   reason.
3. The model must then give the outputs that are stored in the artifact for its stored inputs; else all is undone. That
   proves what names cannot: activations, heads, scales, constants in the model's code.
4. Tensors and layers are replaced, never written to: `detach` puts the same objects back. A module that holds several
   layers on a GPU gets hooks, through which they share copies of what they read; `detach` takes them away.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsec import store
from sparsec.artifact import Artifact
from sparsec.attached import Attached
from sparsec.backend import CHECK_FILE, CheckData, Parts, compare
from sparsec.errors import UsageError
from sparsec.pipeline import CLOSE_IN, relative_difference
from sparsec.tracing import outputs_by_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sparsec.view import WeightView

log = logging.getLogger("sparsec")
_MARK = "_sparsec_attached"
_CONSTANT = re.compile(r"(.*\.)?lifted_tensor_\d+")  # torch.export's name of a tensor that is neither
_LINEAR_TOLERANCE = 1e-5  # reordered fp32 sums, of the largest output


def attach(model: nn.Module, path: str | Path, originals: Literal["keep", "drop"] = "keep") -> Attached:
    """Put an artifact's kernels and weights into the model it was compiled from, in place. Returns what runs how.

    The model must be in eval mode and in the artifact's types: on the CPU, whose kernels run float32, or whole on one
    CUDA GPU, whose kernels run bf16 and fp16; there, layers that are predicted slower sparse run dense. `originals`:
    `keep` holds the replaced weights in memory, so that `detach` can restore them; `drop` frees them. Raises UsageError
    when model and artifact do not belong together, ArtifactError when the artifact is damaged; the model is then
    unchanged.
    """
    if originals not in ("keep", "drop"):
        raise UsageError(f"originals={originals!r} is not known; expected keep or drop")
    artifact = Artifact.open(path)
    device = _check_model(model)
    parts = artifact.parts(device)
    names = _match(model, parts, artifact)
    attached = Attached(str(path))
    try:
        _fill(model, parts, names, attached)
        _prove(model, artifact)
        if _make_read_layers_dense(model, attached):
            _prove(model, artifact)
    except BaseException:
        attached.undo()
        raise
    if originals == "drop":
        attached.forget()
    setattr(model, _MARK, attached)
    for name, reason in attached.dense.items():
        log.info("%s runs dense: %s", name, reason)
    return attached


def detach(model: nn.Module) -> None:
    """Undo `attach`: the model's own layers, parameters and buffers are back, the same objects. Raises UsageError."""
    attached = getattr(model, _MARK, None)
    if attached is None:
        raise UsageError(f"this {type(model).__name__} has no artifact attached; sparsec.attach(model, path) does that")
    attached.undo()
    delattr(model, _MARK)


def _check_model(model: nn.Module) -> str:
    """The device that the model is on."""
    if attached := getattr(model, _MARK, None):
        raise UsageError(f"{attached.path} is attached to this model already; call sparsec.detach(model) first")
    if model.training:
        raise UsageError("the model is in train mode and an artifact is for inference; call model.eval() first")
    where: dict[str, str] = {}
    for name, tensor in _tensors(model):
        where.setdefault(str(tensor.device), name)
    if len(where) > 1:
        (one, first), (other, second) = list(where.items())[:2]
        raise UsageError(f"{first} is on {one} and {second} on {other}; load the whole model on one device")
    for device, name in where.items():
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise UsageError(f"{name} is on {device}, the kernels run on the CPU or a CUDA GPU; load the model there")
    return next(iter(where), "cpu")


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers, under all their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _match(model: nn.Module, parts: Parts, artifact: Artifact) -> dict[str, list[str]]:
    """Rule 1. For each name of the artifact, the model's names that take it: its own, and those tied to it."""
    held = parts.tensors.keys() | parts.layers.keys()
    found: dict[str, Tensor] = {}
    for name in sorted(held):
        tensor = _find(model, name)
        if tensor is None and not _CONSTANT.fullmatch(name):
            raise _foreign(model, artifact, f"the artifact holds {name}, which the model lacks")
        if tensor is not None:
            found[name] = tensor
            _check_like(model, parts, artifact, name, tensor)
    unread = {entry["name"] for entry in artifact.manifest["exclusions"] if entry["role"] == "unused"}
    tied: dict[int, list[str]] = {}
    for name, tensor in _tensors(model):
        tied.setdefault(id(tensor), []).append(name)
    for name, _ in model.named_parameters():
        aliases = tied[id(_find(model, name))]
        if not (held | unread) & set(aliases):
            raise _foreign(model, artifact, f"the model computes with {name}, which the artifact lacks")
    return {
        name: [name, *(alias for alias in tied.get(id(tensor), ()) if alias not in held)]
        for name, tensor in found.items()
    }


def _check_like(model: nn.Module, parts: Parts, artifact: Artifact, name: str, tensor: Tensor) -> None:
    layer = name in parts.layers
    shape = parts.views[name].parameter if layer else tuple(parts.tensors[name].shape)
    dtype = parts.dtypes[name] if layer else parts.tensors[name].dtype
    if shape != tuple(tensor.shape):
        raise _foreign(
            model, artifact, f"{name} has shape {shape} in the artifact and {tuple(tensor.shape)} in the model"
        )
    if dtype != tensor.dtype:
        raise UsageError(
            f"{name} is {dtype} in {artifact.root} and {tensor.dtype} in the model; load the model with dtype={dtype}"
        )


def _foreign(model: nn.Module, artifact: Artifact, what: str) -> UsageError:
    origin = artifact.manifest["source"]
    made_from = f"{origin.get('model', 'a model')} ({origin.get('class', 'unknown class')})"
    return UsageError(
        f"{artifact.root} does not belong to this {type(model).__name__}: {what}; it was compiled from {made_from}: "
        "attach it to that model, loaded as that class"
    )


def _find(model: nn.Module, name: str) -> Tensor | None:
    """The model's parameter or buffer of this name."""
    slot = _slot(model, name)
    return None if slot is None else getattr(slot[0], slot[1])[slot[2]]


def _slot(model: nn.Module, name: str) -> tuple[nn.Module, str, str] | None:
    """(module, which of its dictionaries, key) where the parameter or buffer of this name is."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return None
    return next(((owner, where, leaf) for where in ("_parameters", "_buffers") if leaf in getattr(owner, where)), None)


def _fill(model: nn.Module, parts: Parts, names: dict[str, list[str]], attached: Attached) -> None:
    """Rule 2: tensors first, so that layers find their new biases."""
    for name, tensor in parts.tensors.items():
        if name in names:
            _put_tensor(model, names[name], tensor, attached)
    attached.dense |= parts.dense
    made: dict[int, nn.Module] = {}  # a module that stands in two places stays one
    for name, make in parts.layers.items():
        for alias in names[name]:
            path, _, leaf = alias.rpartition(".")
            owner = model.get_submodule(path)
            if reason := _no_product(owner, leaf, parts.views[name]) if path else "it is the model itself":
                _put_tensor(model, [alias], make(None).unpacked(), attached)
                attached.dense[alias] = reason
                continue
            layer = made.setdefault(id(owner), make(owner._parameters.get("bias")))
            parent, _, key = path.rpartition(".")
            attached.put(model.get_submodule(parent), "_modules", key, layer)
            attached.layers += (alias,)
    if parts.share is not None:
        attached.share(model, parts.share)


def _put_tensor(model: nn.Module, names: list[str], tensor: Tensor, attached: Attached) -> None:
    """Put one tensor under all these names, frozen; the model's own memory where it holds the same numbers."""
    import torch
    from torch import nn

    old = _find(model, names[0])
    assert old is not None
    shared = old.detach() if torch.equal(old, tensor) else tensor.detach()
    parameter = nn.Parameter(shared, requires_grad=False) if isinstance(old, nn.Parameter) else shared
    for name in names:
        slot = _slot(model, name)
        assert slot is not None
        attached.put(*slot, parameter)


def _no_product(owner: nn.Module, leaf: str, view: WeightView) -> str | None:
    """Why a kernel cannot stand in for a module, or None when it does nothing but multiply and add its bias."""
    import torch

    kind = type(owner).__name__
    if leaf != "weight" or owner._parameters.keys() - {"weight", "bias"} or owner._buffers or owner._modules:
        return f"{kind} holds more than a weight and a bias"
    if owner._forward_hooks or owner._forward_pre_hooks:
        return f"the {kind} has forward hooks, which a kernel would not run"
    x = torch.randn(1, 2, view.shape[2], generator=torch.Generator().manual_seed(0))
    weight = owner._parameters[leaf]
    assert weight is not None
    x = x.to(weight)  # its dtype and device
    allowed = CLOSE_IN.get(str(x.dtype).removeprefix("torch."), _LINEAR_TOLERANCE)
    try:
        with torch.no_grad():
            expected = torch.nn.functional.linear(x, view.to_matrices(weight)[0], owner._parameters.get("bias"))
            same = relative_difference(owner(x), expected) <= allowed
    except Exception:  # whatever a module raises that wants other inputs
        same = False
    return None if same else f"{kind} computes more than a product"


def _make_read_layers_dense(model: nn.Module, attached: Attached) -> bool:
    """Unpack for good what the model's own code reads of layers: a packed weight is unpacked by every read."""
    layers: dict[str, Any] = {name: model.get_submodule(name.rpartition(".")[0]) for name in attached.layers}
    read = {name: layer.unpacked() for name, layer in layers.items() if layer.reads}
    for name, weight in read.items():
        parent, _, key = name.rpartition(".")[0].rpartition(".")
        attached.put_back(model.get_submodule(parent), "_modules", key)
        _put_tensor(model, [name], weight, attached)
        attached.dense[name] = "the model's code reads the weight itself"
    attached.layers = tuple(name for name in attached.layers if name not in read)
    return bool(read)


def _prove(model: nn.Module, artifact: Artifact) -> None:
    """Rule 3."""
    import torch

    check = CheckData.from_tensors(store.load_tensors(artifact.root / CHECK_FILE))
    try:
        with torch.no_grad():
            device = next((tensor.device for _, tensor in _tensors(model)), torch.device("cpu"))
            found = outputs_by_name(model(**{name: value.to(device) for name, value in check.inputs.items()}), [])
            found = {name: value.cpu() for name, value in found.items()}
    except Exception as error:  # whatever another model's code raises
        reason = (str(error).splitlines() or [""])[0]
        raise _foreign(model, artifact, f"it fails on the stored inputs ({type(error).__name__}: {reason})") from error
    proof = compare("outputs", found, check.outputs, artifact.manifest["tolerance"])
    if not proof.ok:
        raise _foreign(model, artifact, f"its outputs are not the stored ones ({proof.detail})")
