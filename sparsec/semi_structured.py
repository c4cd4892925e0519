"""torch's two 2:4 kernels: which weights they take, which one this machine has, their product, and graphs that use it.

torch keeps both behind `torch.sparse.SparseSemiStructuredTensor`, a tensor whose `linear` runs the kernel. cuSPARSELt
is a library that most CUDA builds of torch bring along; CUTLASS is compiled into torch, for compute capability 8 only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsec import _fx
from sparsec.errors import ArtifactError, UsageError
from sparsec.pattern import NM

if TYPE_CHECKING:
    from torch.fx import GraphModule

Name = Literal["cuSPARSELt", "CUTLASS"]
TWO_OF_FOUR = NM(2, 4)
DTYPES = (torch.float16, torch.bfloat16)
FIRST_CAPABILITY = (8, 0)  # Ampere: the first GPUs with sparse tensor cores
_MISSING = "find a machine with such a GPU, or load another backend of the artifact if it has one (backend=...)"

Compress = Callable[[Tensor], Tensor]
"""A 2:4 weight (rows, cols) -> what torch multiplies sparse."""


def tensor_class(name: Name) -> Any:
    """torch's tensor that runs the kernel."""
    return {
        "cuSPARSELt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
        "CUTLASS": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    }[name]


def multiples(name: Name, dtype: torch.dtype) -> tuple[int, int]:
    """What the rows and columns of a weight must be multiples of, as this torch has it."""
    limits = tensor_class(name)._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return limits.sparse_min_rows, limits.sparse_min_cols


def takes(name: Name, dtype: torch.dtype, rows: int, cols: int) -> bool:
    """Whether the kernel multiplies a weight (rows, cols) of this type."""
    if dtype not in DTYPES:
        return False
    of_rows, of_cols = multiples(name, dtype)
    return not rows % of_rows and not cols % of_cols


def of_this_machine() -> Name:
    """The kernel that the current GPU runs. Raises UsageError where there is none."""
    if not torch.cuda.is_available():
        raise UsageError(
            f"backend torch24 runs on a CUDA GPU of compute capability 8.0 or newer, and torch {torch.__version__} "
            f"finds no CUDA GPU; {_MISSING}"
        )
    capability, gpu = torch.cuda.get_device_capability(), torch.cuda.get_device_name()
    if capability < FIRST_CAPABILITY:
        raise UsageError(f"{gpu} has compute capability {capability[0]}.{capability[1]}, torch24 needs 8.0; {_MISSING}")
    if torch.backends.cusparselt.is_available():
        return "cuSPARSELt"
    if capability[0] == FIRST_CAPABILITY[0]:
        return "CUTLASS"
    raise UsageError(
        f"{gpu} needs cuSPARSELt for 2:4, and torch {torch.__version__} has none (its CUTLASS kernels run on compute "
        "capability 8 only); install a torch built with cuSPARSELt, such as the CUDA wheels of pytorch.org"
    )


def compressor() -> Compress | None:
    """What compresses for the current GPU's cuSPARSELt; None where it has none."""
    try:
        name = of_this_machine()
    except UsageError:
        return None
    return partial(compressed, name) if name == "cuSPARSELt" else None


def compressed(name: Name, weight: Tensor) -> Tensor:
    """A 2:4 weight (rows, cols) on the GPU in the kernel's own form. Raises UsageError where torch refuses it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor is in prototype stage")
        try:
            found: Tensor = tensor_class(name).from_dense(weight.contiguous())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UsageError(
                f"torch {torch.__version__} refuses {name} on {torch.cuda.get_device_name(weight.device)}: "
                f"{str(error).splitlines()[0]}; update torch, or load another backend of the artifact"
            ) from error
    return found


def semi_structured_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias: x (..., cols) of any strides, `weight` a `compressed` (rows, cols), y (..., rows).

    torch's own `linear` needs x to be two-dimensional or contiguous, and the kernels need a token.
    """
    tokens = x.reshape(-1, x.shape[-1])
    if not len(tokens):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    return torch.nn.functional.linear(tokens, weight, bias).view(*x.shape[:-1], weight.shape[0])


def compress_weight(site: str, weight: Tensor, compress: Compress) -> Tensor:
    """Compress a weight (rows, cols). Raises ArtifactError where it is not 2:4: torch would drop some of it."""
    if broken := TWO_OF_FOUR.violations(weight[None]).first:
        raise ArtifactError(f"{site} is not 2:4: {broken[0]}; compile the model again")
    return compress(weight)


def compress_weights(module: GraphModule, weights: Collection[str], compress: Compress) -> None:
    """Compress these weights of a graph, which are on the GPU, and let the products with them run sparse. In place.

    One weight at a time is there twice. Raises ArtifactError where one is not 2:4.
    """
    for name in weights:
        made = compress_weight(name.removesuffix("_dense"), _fx.get_tensor(module, name), compress)
        _fx.set_tensor(module, name, made)
    for node in _fx.calls(module.graph, torch.ops.aten.linear.default):
        if str(node.args[1].target) in weights:
            new = _fx.call(node, semi_structured_linear, node.args, node.meta[_fx.TYPE], "semi_structured")
            _fx.replace(node, new)
