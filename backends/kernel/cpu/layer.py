"""A layer of a model that runs a packed weight: what `sparsec.attach` puts in the place of a Linear or Conv1D."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from sparsec.backends.kernel.cpu import int8, stream
from sparsec.backends.kernel.cpu.linear import stream_linear
from sparsec.errors import UsageError
from sparsec.layout import decompress
from sparsec.view import WeightView


class Product(NamedTuple):
    """A family of kernels: what multiplies by a packed weight, and unpacks it to (1, rows, cols) of a type."""

    run: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    unpack: Callable[[Tensor, torch.dtype], Tensor]


def _of_stream(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return decompress(stream.unpack(packed), dtype)


def _of_int8(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return decompress(int8.unpack(packed), dtype)


FLOAT = Product(stream_linear, _of_stream)
INT8 = Product(int8.int8_linear, _of_int8)


class SparseLinear(nn.Module):
    """y = x @ weight.T + bias for inference, of a weight packed for `product`.

    `view`: how the weight of the layer it replaces lies; `dtype`: what it computes in. The weight is held packed only;
    `weight` unpacks it for code that computes with it, and `reads` counts how often that happened. Whoever would train,
    save, cast or move the layer gets a UsageError.
    """

    stream: Tensor

    def __init__(
        self,
        product: Product,
        stream: Tensor,
        view: WeightView,
        bias: nn.Parameter | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("stream", stream, persistent=False)
        self.register_parameter("bias", bias)
        self.product, self.view, self.reads = product, view, 0
        _, self.out_features, self.in_features = view.shape
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features) of its dtype; y: (..., out_features)."""
        if self.training:
            raise UsageError(f"{_FOR_INFERENCE}: call model.eval(), or sparsec.detach(model) to train it")
        return self.product.run(x, self.stream, self.bias, self.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> PackedWeight:
        """Its dtype, device and shape are there at once; used as a tensor, it is unpacked, every time."""
        return PackedWeight(self)

    def unpacked(self) -> Tensor:
        """The weight as the model's own layer held it."""
        return self.view.to_parameter(self.product.unpack(self.stream, self.dtype))

    def extra_repr(self) -> str:
        """As nn.Linear prints itself."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        asked = fn(torch.empty(0, dtype=self.dtype, device=self.stream.device))
        if asked.dtype != self.dtype or asked.device != self.stream.device:
            kind, place = str(self.dtype).removeprefix("torch."), self.stream.device
            raise UsageError(
                f"{_FOR_INFERENCE} in {kind} on {_words(place)}; {asked.dtype} on {asked.device} was asked for: "
                "sparsec.detach(model) restores the dense model, which can be cast and moved"
            )
        return self  # as it is already; torch's compressed weights take no `to`

    def _save_to_state_dict(self, *_: Any) -> None:
        raise UsageError(
            "an attached model has no state dict, its weights are packed: share the artifact's folder, or call "
            "sparsec.detach(model) and save the dense model"
        )

    def _load_from_state_dict(self, *_: Any) -> None:
        raise UsageError(f"{_FOR_INFERENCE}, and takes no weights: sparsec.detach(model), load, compile, attach again")


_FOR_INFERENCE = "an attached layer is for inference"
_DETACH = "sparsec.detach(model), change the dense model, compile and attach again"


def _words(place: torch.device) -> str:
    return "the CPU" if place.type == "cpu" else str(place)


class PackedWeight:
    """A stand-in for a layer's weight: `weight.dtype` costs nothing, `weight @ x` unpacks."""

    requires_grad = False
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    _layer: SparseLinear

    def __init__(self, layer: SparseLinear) -> None:
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "shape", torch.Size(layer.view.parameter))
        object.__setattr__(self, "dtype", layer.dtype)
        object.__setattr__(self, "device", layer.stream.device)

    def __setattr__(self, name: str, value: Any) -> None:
        raise UsageError(f"{_FOR_INFERENCE}, and its weight cannot be written (.{name}): {_DETACH}")

    def unpack(self) -> Tensor:
        """The dense weight, counted as a read."""
        self._layer.reads += 1
        return self._layer.unpacked()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse_in_place(name)
        return getattr(self.unpack(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.unpack()[index]

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.unpack() @ other

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _refuse_in_place(getattr(function, "__name__", ""))
        args, kwargs = _pytree.tree_map_only(cls, cls.unpack, (args, kwargs or {}))
        return function(*args, **kwargs)


def _refuse_in_place(name: str) -> None:
    """What writes into an unpacked copy would be lost in silence: torch ends such names with one underscore."""
    if name.endswith("_") and not name.endswith("__"):
        raise UsageError(f"{_FOR_INFERENCE}, and its weight cannot be written ({name}): {_DETACH}")
